"""Attention of one new token over a KV cache: split-K, grouped queries, and the cascade for answers that share a
prompt. Forward only, nothing is trained while decoding. Copy freely.

Physics. A step of decoding reads every cached key and value once and multiplies each with a few queries. A key and its
value are 4 D bytes in bf16 and cost 4 D flops a query: with r queries a KV head the intensity is r flops a byte. An
H200 needs 184 (790 Tflop/s of bf16 products, 4.3 TB/s) before arithmetic is the limit, and r is 8 in the 3B (16 query
heads on 2 KV heads) and 7 in the 7B. So decoding is a memory copy that does attention in passing. Three things follow.

1. Never repeat K and V for the query heads of a group: that reads the cache 8 times. The r queries of a KV head are the
   rows of one tile, q (r, D) @ K^T (D, BN). Tensor cores take at least 16 rows (mma.sync, "HMMA"), and 64 at Hopper's
   full rate (wgmma, "HGMMA"). 8 rows are padded to 16: wasted products, but nobody waits for them.
2. Split the keys. One program for each sequence and KV head leaves 132 SMs idle when the batch is small: a lone
   sequence of the 3B makes two. So the keys are cut into runs; each program leaves the output o_s of its run and
   L_s = log2 of its sum of exponentials, and a second, small kernel merges:
       L = log2 sum 2^L_s,   o = sum 2^(L_s - L) o_s       (a weighted mean; an empty run has L_s = -inf, weight 0)
   That moves 8 (D + 1) bytes a query and run, against 4 D a key and KV head: little when a run has 256 keys.
3. Read the shared prompt once. Eight answers to a question share its P tokens. Plain decoding reads 8 (P + R) keys a
   step, the cascade P + 8 R; with P = 1024, R = 256 that is 10240 against 3072, 3.3 times less. For the prompt, 8
   answers x 8 heads of a KV head are 64 rows: exactly one wgmma tile (7B: 56, padded), at 64 flops a byte, still below
   184. It is the same kernel with more rows, and the same merge, over the runs of both parts.

By that count a step of the 3B at batch 256 (1024 + 512 tokens) reads for 2.8 ms, or 0.84 ms with the prompt shared, and
1.4 ms of weights. Its 36 layers x 12 launches cost more than that: put the step into a CUDA graph first. Everything
here can be captured: the host looks at no tensor's values, and lengths live on the device.

Letters: B cache rows, Hq query heads, Hk KV heads, D head width, C keys of the cache, A answers a prompt, P prompts.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634   # exp2 is one instruction, exp is two: softmax scale and log2(e) are one factor
PROGRAMS = 264               # two for each of 132 SMs
RUN = 256                    # fewest keys of a run: shorter ones spend their time on the merge
MOST_RUNS = 64               # the merge holds all runs of a query in registers


@triton.jit(do_not_specialize=("C", "runs", "tiles", "q_rows"))  # they change with the step: no new compilation then
def _partial(Q, K, V, START, LENGTH, KEEP, O, LSE, C, runs, tiles, q_rows, scale, k_seq, k_head, k_key, v_seq, v_head,
             v_key, keep_seq, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             HAS_START: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_KEEP: tl.constexpr):
    # Program (cache row b and tile of its queries, KV head, run). Cache row b belongs to rows START[b]:START[b + 1] of
    # Q (q_rows, Hq, D), or to row b alone; its query r is head r % G of row r // G. O (runs, q_rows, Hq, D) and
    # LSE (runs, q_rows, Hq) are contiguous.
    b = (tl.program_id(0) // tiles).to(tl.int64)
    head = tl.program_id(1)
    run = tl.program_id(2)
    r = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    if HAS_START:
        row = tl.load(START + b)
        real = r < (tl.load(START + b + 1) - row) * G
    else:
        row = b
        real = r < G
    query = ((row + r // G) * tl.num_programs(1) + head) * G + r % G
    q = tl.load(Q + query[:, None] * D + d[None, :], mask=real[:, None], other=0.0)

    n = tl.load(LENGTH + b).to(tl.int32) if HAS_LENGTH else C
    share = tl.cdiv(tl.cdiv(n, runs), BN) * BN
    first = run * share
    last = tl.minimum(first + share, n)
    K += b * k_seq + head * k_head
    V += b * v_seq + head * v_head
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for j in range(first, last, BN):
        t = j + tl.arange(0, BN)
        seen = t < last
        if HAS_KEEP:
            seen = seen & (tl.load(KEEP + b * keep_seq + t, mask=seen, other=0) != 0)
        # Beyond the length the cache is uninitialised, and 0 * NaN is NaN: values nobody may see are loaded as 0.
        k = tl.load(K + t[:, None].to(tl.int64) * k_key + d[None, :], mask=seen[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(seen[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN: nothing was seen so far
        p = tl.math.exp2(s - finite[:, None])
        a = tl.math.exp2(m - finite)
        l = l * a + tl.sum(p, 1)
        v = tl.load(V + t[:, None].to(tl.int64) * v_key + d[None, :], mask=seen[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * a[:, None], input_precision="ieee")
        m = m_new
    at = run.to(tl.int64) * q_rows * tl.num_programs(1) * G + query
    acc = acc / tl.where(l == 0, 1.0, l)[:, None]
    tl.store(O + at[:, None] * D + d[None, :], acc.to(O.dtype.element_ty), mask=real[:, None])
    tl.store(LSE + at, m + tl.log2(l), mask=real)


@triton.jit(do_not_specialize=("rows",))
def _merge(O, LSE, OUT, rows, RUNS: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr):
    # One program a query: O (RUNS, rows, D), LSE (RUNS, rows) -> OUT (rows, D).
    row = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, SLOTS)
    d = tl.arange(0, D)
    lse = tl.load(LSE + run * rows + row, mask=run < RUNS, other=float("-inf"))
    o = tl.load(O + (run * rows + row)[:, None] * D + d[None, :], mask=(run < RUNS)[:, None], other=0.0)
    m = tl.max(lse, 0)
    w = tl.math.exp2(lse - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(w, 0)
    out = tl.sum(w[:, None] * o, 0) / tl.where(total == 0, 1.0, total)  # no key anywhere: 0
    tl.store(OUT + row * D + d, out.to(OUT.dtype.element_ty))


def tile(rows: int, dtype: torch.dtype) -> tuple[int, int, dict]:
    """Query rows of a KV head -> rows of a tile, keys of a tile, launch options."""
    if dtype == torch.float32:  # twice the bytes, and exact products without tensor cores: 64 rows spill registers
        return 16, 32, dict(num_warps=8, num_stages=2)
    return min(64, max(16, triton.next_power_of_2(rows))), 64, dict(num_warps=4, num_stages=3)


def count_runs(programs: int, C: int) -> int:
    """Into how many runs to cut C keys so that `programs` programs become PROGRAMS, none shorter than RUN keys."""
    return max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(C, RUN), MOST_RUNS))


def _launch(q, parts):
    """parts: (k, v, lengths, keep, starts, most rows of q a cache row serves) -> all of them merged (R, Hq, D)."""
    q = q.contiguous()
    (R, Hq, D), plans = q.shape, []
    for k, v, _, _, starts, most in parts:
        B, Hk, C, _ = k.shape
        if v.shape != k.shape or k.shape[3] != D or Hq % Hk or starts is None and B != R or D not in (16, 32, 64, 128):
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: need q (rows, Hq, D), k and "
                             "v (rows, Hk, C, D), Hq a multiple of Hk, D 16, 32, 64 or 128")
        BM, BN, options = tile(most * Hq // Hk, q.dtype)
        tiles = triton.cdiv(most * Hq // Hk, BM)
        plans.append((tiles, count_runs(max(1, B * tiles * Hk), C), BM, BN, options))
    out, total, at = torch.empty_like(q), sum(plan[1] for plan in plans), 0
    partial = q.new_empty(total, R, Hq, D, dtype=torch.float32) if total > 1 else out[None]  # a lone run is the result
    lse = q.new_empty(total, R, Hq, dtype=torch.float32)
    for (k, v, lengths, keep, starts, _), (tiles, runs, BM, BN, options) in zip(parts, plans):
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
        some = [q if x is None else x.contiguous() for x in (starts, lengths, keep if keep is None else keep.char())]
        _partial[(len(k) * tiles, k.shape[1], runs)](
            q, k, v, *some, partial[at:], lse[at:], k.shape[2], runs, tiles, R, D ** -0.5 * LOG2E, *k.stride()[:3],
            *v.stride()[:3], some[2].stride(0), Hq // k.shape[1], D, BM, BN, starts is not None, lengths is not None,
            keep is not None, **options)
        at += runs
    if total > 1:
        _merge[(R * Hq,)](partial, lse, out, R * Hq, total, triton.next_power_of_2(total), D, num_warps=4)
    return out


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """q (B, Hq, D), k and v (B, Hk, C, D) of any strides with neighbouring D -> (B, Hq, D).

    lengths (B,) int: keys 0 .. lengths[b] - 1 exist, the rest of the cache is never read (None: all C exist).
    keep (B, C) bool: which of them may be seen, for a prompt padded on the left. A sequence that sees nothing gets 0.
    """
    return _launch(q, [(k, v, lengths, keep, None, 1)])


def cascade(q: Tensor, k_prompt: Tensor, v_prompt: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, *,
            prompt_lengths: Tensor | None = None, prompt_keep: Tensor | None = None, starts: Tensor | None = None,
            most: int | None = None) -> Tensor:
    """Rows of q (R, Hq, D) that share prompts, the rows of a prompt side by side -> (R, Hq, D).

    k_prompt, v_prompt (P, Hk, Cp, D) stand once for each prompt, k, v (R, Hk, C, D) hold an answer's own tokens.
    starts (P + 1,) int on the device: rows starts[p]:starts[p + 1] belong to prompt p, at most `most` of them (answers
    end at different times). Without it every prompt has R / P rows.
    """
    P, R = len(k_prompt), len(q)
    if starts is None:
        most = R // max(1, P)
        starts = torch.arange(P + 1, device=q.device, dtype=torch.int32) * most
    return _launch(q, [(k_prompt, v_prompt, prompt_lengths, prompt_keep, starts, most), (k, v, lengths, None, None, 1)])


def _mask(k, lengths, keep):
    """(B, C) bool: which keys are seen."""
    B, _, C, _ = k.shape
    seen = torch.ones(B, C, dtype=torch.bool, device=k.device) if keep is None else keep.bool()
    return seen if lengths is None else seen & (torch.arange(C, device=k.device) < lengths[:, None])


def _softmax_reference(q, k, v, seen):
    (B, Hq, D), Hk = q.shape, k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    s = torch.einsum("bhgd,bhcd->bhgc", q.view(B, Hk, Hq // Hk, D).to(wide), k.to(wide)) * D ** -0.5
    p = s.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    v = v.to(wide).masked_fill(~seen[:, None, :, None], 0.0)
    o = torch.einsum("bhgc,bhcd->bhgd", p, v).reshape(B, Hq, D).to(q.dtype)
    return o.masked_fill(~seen.any(1)[:, None, None], 0.0)


def decode_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, keep: Tensor | None = None):
    """The twin in plain PyTorch, for any device and dtype."""
    return _softmax_reference(q, k, v, _mask(k, lengths, keep))


def cascade_reference(q: Tensor, k_prompt: Tensor, v_prompt: Tensor, k: Tensor, v: Tensor,
                      lengths: Tensor | None = None, *, prompt_lengths: Tensor | None = None,
                      prompt_keep: Tensor | None = None, starts: Tensor | None = None, most: int | None = None):
    """The twin in plain PyTorch: the prompt repeated for every answer, one softmax over everything."""
    counts = len(q) // max(1, len(k_prompt)) if starts is None else starts.diff().long()
    of_prompt = k_prompt, v_prompt, _mask(k_prompt, prompt_lengths, prompt_keep)
    k_prompt, v_prompt, seen = (x.repeat_interleave(counts, 0) for x in of_prompt)  # a row for every answer
    seen = torch.cat((seen, _mask(k, lengths, None)), 1)
    return _softmax_reference(q, torch.cat((k_prompt, k), 2), torch.cat((v_prompt, v), 2), seen)


# ---------------------------------------------------------------------------------------------------- shipped settings

def configs():
    """For compile_check: (name, kernel, arguments, launch options, allowances)."""
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    bf16, fp16, fp32, int32, P, C, runs = torch.bfloat16, torch.float16, torch.float32, torch.int32, 32, 2048, 4
    # 16 rows do not fill wgmma's 64 and need not: 8 flops a byte where the card could do 184.
    few, none = dict(hmma=True), dict(tensor_cores=False)
    for name, A, Hq, Hk, D, dtype, keep, allowed in (
            ("decode 3B", 1, 16, 2, 128, bf16, False, few), ("decode 7B", 1, 28, 4, 128, bf16, True, few),
            ("decode tiny", 1, 4, 2, 32, bf16, False, few), ("cascade prompt 3B fp32", 8, 16, 2, 128, fp32, True, none),
            ("cascade prompt 3B", 8, 16, 2, 128, bf16, False, {}), ("cascade prompt 7B", 8, 28, 4, 128, bf16, True, {}),
            ("cascade prompt D64 fp16", 8, 16, 2, 64, fp16, False, {})):
        BM, BN, options = tile(A * Hq // Hk, dtype)
        q, cache = meta(P * A, Hq, D, dtype=dtype), meta(P, Hk, C, D, dtype=dtype)
        o = meta(runs, P * A, Hq, D, dtype=fp32)
        args = (q, cache, cache, meta(P + 1, dtype=int32), meta(P, dtype=int32), meta(P, C, dtype=torch.int8), o,
                o[..., 0], C, runs, 1, P * A, 0.1, *cache.stride()[:3], *cache.stride()[:3], C, Hq // Hk, D, BM, BN,
                A > 1, True, keep)
        yield name, _partial, args, options, allowed
    o = meta(64, 4096, 128, dtype=fp32)
    yield "merge of 64 runs", _merge, (o, o[..., 0], meta(4096, 128), 4096, 64, 64, 128), dict(num_warps=4), none
