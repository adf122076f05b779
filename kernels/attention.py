"""Attention in Triton, forward and backward: packed sequences, grouped queries, causal or not, one prompt many answers.

Needs torch and triton, nothing else of this repository. `attention` launches the kernels, `attention_reference` is the
same function in plain PyTorch. On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before triton
is first imported).

THE PHYSICS. softmax(Q K^T / sqrt(D)) V is two matrix products, 4 Nq Nk D floating point operations a head, around an
Nq x Nk matrix P. For 16,384 causal tokens and 16 heads of 128 that is 1.1 TFLOP: 1.4 ms of an H200, which does 790
TFLOP/s in bf16. P would be 8.6 GB: writing and reading it once takes 4 ms at 4.3 TB/s. So P must not leave the chip.
  Tiles    A program owns 128 query rows of one head and walks over the keys in tiles, with a running maximum m and sum
           l of each row: when m grows, what was summed shrinks by exp(m - m') (arXiv 1805.02867, 2205.14135).
  Products of a tile of 128 x 128, D = 128: S = Q K^T and O += P V, 8.4 MFLOP, 2048 clocks of an SM's tensor cores.
  Bytes    K and V of the tile, 64 KiB, fetched by TMA while the tile before is computed: 128 FLOP a byte, 3.9 TB/s at
           500 TFLOP/s, so from L2. The G query heads of a key head are neighbours in the grid and share what L2 holds.
  Limit    beside 2048 clocks of products: 16,384 exponentials at 16 a clock = 1024, six fp32 operations an element at
           128 a clock = 768. Nothing overlapped, that is 53 % of the peak at D = 128, 42 % at 80, 36 % at 64. Hence
           one factor for scale and log2(e), exp2, and no mask on tiles that every row sees whole. FlashAttention-3
           (2407.08608) hides the exponentials behind another warp group's products; warp_specialize, plain Triton's
           way to ask for that, refuses two loops and host-made descriptors, and was left out.
  Head 80  = 64 + 16: a product over the head is one over 64 and one over 16. Padded to 128 it were 1.6 times the work.
           Every head below is a pair of blocks, the second one unused for widths that are powers of two.
  fp32     makes three TF32 products of every one (tf32x3), and spills registers: it is there to check, not to train.

BACKWARD, with P made again from the log-sum-exp of each row, and delta = rowsum(dO * O):
      dV = P^T dO     dP = dO V^T     dS = P * (dP - delta)     dQ = dS K     dK = dS^T Q
Five products. dK and dV sum over queries, dQ over keys: a program can keep only one kind in its registers.
  deterministic=True   two passes, one owns keys (S, dP, dV, dK), one owns queries (S, dP, dQ). Seven products, every
                       sum in a fixed order, the same bits every time. By the clock model above: 45 % of the peak.
  deterministic=False  one pass that owns keys and adds dS K to an fp32 dQ in memory, by TMA reduce-add. Five products,
                       71 % by the same model, but a free order of additions: the last bits of dQ vary.
Passes that own keys would starve: two key heads give few programs, each walks 8 query heads, and a prompt's tile walks
all its answers. So the G heads are split over as many programs as fill the GPU, and the parts are added in fp32.

LAYOUT. q (T, H, D), k and v (T, Hk, D); sequence b owns rows cu[b]:cu[b+1], and may see one other sequence whole, its
prompt. Answers lie directly behind their prompt, so the rows that see a key are one interval. make_layout lists the
tiles on the host, longest first, each with all bounds a program needs. A tile may read rows of a neighbouring sequence
and weigh them with 0: inputs must be finite everywhere.

Written without a GPU at hand: numbers and machine code are checked (python -m kernels.compile_check), speed is not.
Letters: T packed tokens, H query heads, Hk key/value heads, G = H / Hk, D head width = D1 + D2, B sequences.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TILE = 128  # rows a program owns, of queries or keys: two warp groups of 64 rows, WGMMA's M
LOG2E = 1.4426950408889634
FP32 = tl.constexpr("tf32x3")  # how tl.dot multiplies fp32; nothing else changes
SMS = 132  # multiprocessors of an H100 or H200


# CAPITALS are pointers, TMA descriptors, or known when a kernel is compiled.
# ---------------------------------------------------------------- a head of width D1 + D2, as a pair of blocks
@triton.jit
def _load(X, row, head, ROWS, D1, D2):
    a = X[0].load([head, row, 0]).reshape(ROWS, D1)
    if D2:
        return a, X[1].load([head, row, D1]).reshape(ROWS, D2)
    else:
        return a, a


@triton.jit
def _outer(a, b, D2):
    """a b^T, summed over the head."""
    s = tl.dot(a[0], b[0].T, input_precision=FP32)
    if D2:
        s = tl.dot(a[1], b[1].T, s, input_precision=FP32)
    return s


@triton.jit
def _add_product(acc, w, x, D2):
    """acc + w x, in the precision x is stored in, fp32 sums."""
    w = w.to(x[0].dtype)
    first = tl.dot(w, x[0], acc[0], input_precision=FP32)
    if D2:
        return first, tl.dot(w, x[1], acc[1], input_precision=FP32)
    else:
        return first, acc[1]


@triton.jit
def _zeros(ROWS, D1, D2):
    return tl.zeros([ROWS, D1], tl.float32), tl.zeros([ROWS, D2 if D2 else 16], tl.float32)


@triton.jit
def _times(x, factor):
    return x[0] * factor, x[1] * factor


@triton.jit
def _store(X, at, x, keep, D1, D2):
    """Row i of x to X, at element at[i]."""
    at = at[:, None]
    tl.store(X + at + tl.arange(0, D1)[None, :], x[0].to(X.dtype.element_ty), mask=keep[:, None])
    if D2:
        tl.store(X + at + D1 + tl.arange(0, D2)[None, :], x[1].to(X.dtype.element_ty), mask=keep[:, None])


@triton.jit
def _tile(TILES, i):
    """Tile i: first row; the sequence's rows lo:hi; its prompt's p0:p1; end of the rows that see the sequence."""
    at = TILES + 6 * i
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


# ---------------------------------------------------------------- walking over keys: forward, and dQ
@triton.jit
def _spans(row, lo, hi, p0, p1, TILE, BN, CAUSAL):
    """Key tiles our rows see whole, then those seen partly: (prompt from, how many, own from, how many), twice."""
    if CAUSAL:
        own, all_own = (row - lo) // BN, tl.cdiv(tl.minimum(hi, row + TILE) - lo, BN)
    else:
        own, all_own = (hi - lo) // BN, tl.cdiv(hi - lo, BN)
    prompt = (p1 - p0) // BN
    return (p0, prompt, lo, own), (p0 + prompt * BN, tl.cdiv(p1 - p0, BN) - prompt, lo + own * BN, all_own - own)


@triton.jit
def _key_tile(t, span, p1, hi, rows, BN, CAUSAL):
    """First row of the span's tile t; and which of its keys each row sees."""
    p, n, own, _ = span
    j = tl.where(t < n, p + t * BN, own + (t - n) * BN)
    keys = j + tl.arange(0, BN)[None, :]
    keep = keys < tl.where(t < n, p1, hi)
    if CAUSAL:
        keep = keep & (keys <= rows[:, None])  # a prompt's rows come first: always true for them
    return j, keep


@triton.jit
def _softmax_walk(q, m, l, acc, K, V, head, rows, span, p1, hi, scale, D1, D2, BN, CAUSAL, MASKED):
    for t in tl.range(0, span[1] + span[3]):
        j, keep = _key_tile(t, span, p1, hi, rows, BN, CAUSAL)
        s = _outer(q, _load(K, j, head, BN, D1, D2), D2)
        if MASKED:
            s = tl.where(keep, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)  # finite: the first tile walked shows every row at least one key
        p = tl.math.exp2(s * scale - m_new[:, None])
        shrink = tl.math.exp2(m - m_new)
        l = l * shrink + tl.sum(p, 1)
        acc = _add_product(_times(acc, shrink[:, None]), p, _load(V, j, head, BN, D1, D2), D2)
        m = m_new
    return m, l, acc


@triton.jit(do_not_specialize=["T"])
def attn_fwd(Q, Q2, K, K2, V, V2, O, LSE, TILES, scale, T, H: tl.constexpr, G: tl.constexpr, D1: tl.constexpr,
             D2: tl.constexpr, TILE: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """O and LSE (H, T; base 2) of one tile of queries of one head. scale: the softmax scale times log2(e)."""
    h = tl.program_id(0)
    row, lo, hi, p0, p1, _ = _tile(TILES, tl.program_id(1))
    whole, partly = _spans(row, lo, hi, p0, p1, TILE, BN, CAUSAL)
    rows = row + tl.arange(0, TILE)
    K, V, hk = (K, K2), (V, V2), h // G
    q = _load((Q, Q2), row, h, TILE, D1, D2)
    m = tl.full([TILE], float("-inf"), tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = _zeros(TILE, D1, D2)
    m, l, acc = _softmax_walk(q, m, l, acc, K, V, hk, rows, whole, p1, hi, scale, D1, D2, BN, CAUSAL, False)
    m, l, acc = _softmax_walk(q, m, l, acc, K, V, hk, rows, partly, p1, hi, scale, D1, D2, BN, CAUSAL, True)
    keep = rows < hi
    tl.store(LSE + h * T + rows, m + tl.log2(l), mask=keep)
    _store(O, (rows.to(tl.int64) * H + h) * (D1 + D2), _times(acc, (1 / l)[:, None]), keep, D1, D2)


@triton.jit
def _dq_walk(q, do, lse, delta, dq, K, V, head, rows, span, p1, hi, scale, D1, D2, BN, CAUSAL, MASKED):
    for t in tl.range(0, span[1] + span[3]):
        j, keep = _key_tile(t, span, p1, hi, rows, BN, CAUSAL)
        k = _load(K, j, head, BN, D1, D2)
        p = tl.math.exp2(_outer(q, k, D2) * scale - lse[:, None])
        if MASKED:
            p = tl.where(keep, p, 0.0)
        ds = p * (_outer(do, _load(V, j, head, BN, D1, D2), D2) - delta[:, None])
        dq = _add_product(dq, ds, k, D2)
    return dq


@triton.jit(do_not_specialize=["T"])
def attn_bwd_q(Q, Q2, K, K2, V, V2, DO, DO2, LSE, DELTA, DQ, TILES, scale, sm_scale, T, H: tl.constexpr,
               G: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TILE: tl.constexpr, BN: tl.constexpr,
               CAUSAL: tl.constexpr):
    """dQ of one tile of queries of one head; the same walk as forward."""
    h = tl.program_id(0)
    row, lo, hi, p0, p1, _ = _tile(TILES, tl.program_id(1))
    whole, partly = _spans(row, lo, hi, p0, p1, TILE, BN, CAUSAL)
    rows = row + tl.arange(0, TILE)
    keep = rows < hi
    K, V, hk = (K, K2), (V, V2), h // G
    q = _load((Q, Q2), row, h, TILE, D1, D2)
    do = _load((DO, DO2), row, h, TILE, D1, D2)
    lse = tl.load(LSE + h * T + rows, mask=keep, other=float("inf"))
    delta = tl.load(DELTA + h * T + rows, mask=keep, other=0.0)
    dq = _zeros(TILE, D1, D2)
    dq = _dq_walk(q, do, lse, delta, dq, K, V, hk, rows, whole, p1, hi, scale, D1, D2, BN, CAUSAL, False)
    dq = _dq_walk(q, do, lse, delta, dq, K, V, hk, rows, partly, p1, hi, scale, D1, D2, BN, CAUSAL, True)
    _store(DQ, (rows.to(tl.int64) * H + h) * (D1 + D2), _times(dq, sm_scale), keep, D1, D2)


# ---------------------------------------------------------------- walking over queries: dK and dV, and dQ on the way
@triton.jit
def _query_walk(k, v, dk, dv, Q, DO, DQ, LSE, DELTA, keys, hi, first, steps, tail, head, scale, T, HEADS, D1, D2, BM,
                CAUSAL, ADD_DQ, MASKED):
    """`steps` query tiles from row `first` on, in HEADS heads from `head` on. p and ds are transposed: (keys, rows)."""
    for t in tl.range(0, HEADS * steps):
        i = first + (t % steps) * BM
        h = head + t // steps
        rows = i + tl.arange(0, BM)
        lse = tl.load(LSE + h * T + rows, mask=rows < tail, other=float("inf"))  # p = 0 in rows behind the last
        delta = tl.load(DELTA + h * T + rows, mask=rows < tail, other=0.0)
        q = _load(Q, i, h, BM, D1, D2)
        p = tl.math.exp2(_outer(k, q, D2) * scale - lse[None, :])
        if MASKED:
            keep = keys[:, None] < hi
            if CAUSAL:
                keep = keep & (keys[:, None] <= rows[None, :])
            p = tl.where(keep, p, 0.0)
        do = _load(DO, i, h, BM, D1, D2)
        dv = _add_product(dv, p, do, D2)
        ds = (p * (_outer(v, do, D2) - delta[None, :])).to(q[0].dtype)
        dk = _add_product(dk, ds, q, D2)
        if ADD_DQ:
            dq = _add_product(_zeros(BM, D1, D2), ds.T, k, D2)
            DQ[0].atomic_add([h, i, 0], dq[0].reshape(1, BM, D1))
            if D2:
                DQ[1].atomic_add([h, i, D1], dq[1].reshape(1, BM, D2))
    return dk, dv


@triton.jit(do_not_specialize=["T"])
def attn_bwd_kv(Q, Q2, K, K2, V, V2, DO, DO2, DQ, DQ2, LSE, DELTA, DK, DV, TILES, scale, sm_scale, T, HK: tl.constexpr,
                G: tl.constexpr, SPLIT: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TILE: tl.constexpr,
                BM: tl.constexpr, CAUSAL: tl.constexpr, ADD_DQ: tl.constexpr):
    """dK, dV (SPLIT, T, Hk, D) of one tile of keys of one key head, from one of SPLIT parts of its G query heads.

    ADD_DQ adds dQ / sm_scale to DQ (T, H, D) fp32. Keys behind the sequence's end are computed from foreign rows and
    not stored; only ADD_DQ, which would add them up, must mask them.
    """
    hk = tl.program_id(0) // SPLIT
    split = tl.program_id(0) % SPLIT
    row, lo, hi, _, _, tail = _tile(TILES, tl.program_id(1))
    if CAUSAL:
        first = row
        masked = tl.minimum(TILE // BM, tl.cdiv(tail - row, BM))  # the diagonal
    else:
        first = lo
        masked = 0
    steps = tl.cdiv(tail - first, BM)
    if ADD_DQ:
        masked = tl.where(row + TILE > hi, steps, masked)
    keys = row + tl.arange(0, TILE)
    k = _load((K, K2), row, hk, TILE, D1, D2)
    v = _load((V, V2), row, hk, TILE, D1, D2)
    dk, dv = _zeros(TILE, D1, D2), _zeros(TILE, D1, D2)
    Q, DO, DQ, head = (Q, Q2), (DO, DO2), (DQ, DQ2), hk * G + split * (G // SPLIT)
    dk, dv = _query_walk(k, v, dk, dv, Q, DO, DQ, LSE, DELTA, keys, hi, first, masked, tail, head, scale, T,
                         G // SPLIT, D1, D2, BM, CAUSAL, ADD_DQ, True)
    dk, dv = _query_walk(k, v, dk, dv, Q, DO, DQ, LSE, DELTA, keys, hi, first + masked * BM, steps - masked, tail, head,
                         scale, T, G // SPLIT, D1, D2, BM, CAUSAL, ADD_DQ, False)
    at = ((split * T.to(tl.int64) + keys) * HK + hk) * (D1 + D2)
    _store(DK, at, _times(dk, sm_scale), keys < hi, D1, D2)
    _store(DV, at, dv, keys < hi, D1, D2)


@triton.jit(do_not_specialize=["T"])
def attn_delta(O, DO, DELTA, so_t, so_h, sd_t, sd_h, T, D: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr):
    """DELTA (H, T) = rowsum(O * dO), fp32. Reads 4 D bytes a row in bf16: bandwidth is the limit."""
    h = tl.program_id(0)
    rows = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    cols = tl.arange(0, WIDE)[None, :]
    keep = (rows < T)[:, None] & (cols < D)
    o = tl.load(O + rows[:, None] * so_t + h * so_h + cols, mask=keep, other=0.0).to(tl.float32)
    do = tl.load(DO + rows[:, None] * sd_t + h * sd_h + cols, mask=keep, other=0.0).to(tl.float32)
    tl.store(DELTA + h * T + rows, tl.sum(o * do, 1), mask=rows < T)


# ---------------------------------------------------------------- host: which tiles, which configuration, which launch
class Layout(NamedTuple):
    """What sees what, as lists of tiles. Build with `make_layout`."""

    cu: list[int]  # (B + 1) first row of every sequence, and the end
    shared: list[int]  # (B) which sequence is the prompt, -1 for none
    queries: Tensor  # (tiles, 6) int32, see _tile; most keys first
    keys: Tensor  # the same tiles; most queries first


def make_layout(cu_seqlens, shared=None, device=None) -> Layout:
    """Plan a batch once and use it in all layers. Lists or integer tensors; a tensor on a GPU costs a synchronisation.

    cu_seqlens: 0 = cu[0] <= cu[1] <= ... <= cu[B] = T. shared (B): the sequence that is b's prompt, -1 for none.
    make_layout([0, 5, 8, 12, 20], [-1, 0, 0, -1]): a prompt of 5 tokens, its answers of 3 and 4, a sequence of 8.
    """
    cu = torch.as_tensor(cu_seqlens).tolist()
    B = len(cu) - 1
    shared = [-1] * B if shared is None else torch.as_tensor(shared).tolist()
    if B < 0 or cu[0] != 0 or any(a > b for a, b in zip(cu, cu[1:])):
        raise ValueError(f"cu_seqlens must start with 0 and never fall, got {cu}")
    if len(shared) != B:
        raise ValueError(f"shared has {len(shared)} entries for {B} sequences: one for each, -1 for no prompt")
    tail = cu[1:]
    for b, s in enumerate(shared):
        if s != -1 and not (0 <= s < b and shared[s] == -1 and s in (b - 1, shared[b - 1])):
            raise ValueError(f"shared[{b}] = {s}: answers must lie directly behind their prompt (prompt, answer 1, "
                             f"answer 2, ...), and a prompt has no prompt itself; got {shared}")
        if s != -1:
            tail[s] = cu[b + 1]
    tiles = [(row, cu[b], cu[b + 1], cu[s] if s >= 0 else 0, cu[s + 1] if s >= 0 else 0, tail[b])
             for b, s in enumerate(shared) for row in range(cu[b], cu[b + 1], TILE)]
    queries = sorted(tiles, key=lambda t: (t[0] - t[1]) + (t[4] - t[3]), reverse=True)
    keys = sorted(tiles, key=lambda t: t[5] - t[0], reverse=True)
    both = (torch.tensor(x, dtype=torch.int32).view(-1, 6).to(device) for x in (queries, keys))
    return Layout(cu, shared, *both)


def _parts(D: int) -> tuple[int, int]:
    """80 -> 64, 16;  128 -> 128, 0."""
    D1 = 1 << (D.bit_length() - 1)
    if not 16 <= D <= 128 or D - D1 and (D - D1 < 16 or D - D1 & D - D1 - 1):
        raise ValueError(f"head width {D}: must be a power of two from 16 to 128, or two of them added (80 = 64 + 16)")
    return D1, D - D1


def _blocks(x: Tensor, rows: int) -> tuple:
    """The two TMA descriptors of x (T, heads, D): blocks of `rows` rows of one head, first and second part."""
    D1, D2 = _parts(x.shape[2])
    x = x.transpose(0, 1)  # the head first: a leading 1 in the block's shape costs nothing, one in the middle a detour
    return tuple(TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, D]) if D else None for D in (D1, D2))


def _aligned(x: Tensor) -> Tensor:
    """x itself where TMA can read it (last stride 1, all else in steps of 16 bytes), a copy elsewhere."""
    size = x.element_size()
    fits = x.stride(2) == 1 and all(s > 0 and s * size % 16 == 0 for s in x.stride()[:2]) and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


# Rows of the tiles walked over, warps, pipeline stages: heads up to 64, up to 128; fp32.
CONFIG = {"fwd": ((128, 8, 3), (128, 8, 2), (32, 8, 2)), "dq": ((64, 8, 2), (64, 8, 2), (32, 8, 1)),
          "dkdv": ((64, 8, 2), (64, 8, 2), (32, 8, 1)), "one pass": ((64, 8, 2), (64, 8, 2), (64, 8, 1))}


def _options(kernel: str, x: Tensor) -> tuple[int, dict]:
    D1, D2 = _parts(x.shape[2])
    exact = x.dtype == torch.float32
    rows, warps, stages = CONFIG[kernel][2 if exact else D1 + D2 > 64]
    return rows, dict(D1=D1, D2=D2, TILE=TILE, num_warps=warps, num_stages=stages)


def _forward(q, k, v, o, lse, tiles, causal, scale):
    """-> kernel, grid, arguments, options: what a launch runs and compile_check compiles."""
    T, H, D = q.shape
    BN, options = _options("fwd", q)
    args = (*_blocks(q, TILE), *_blocks(k, BN), *_blocks(v, BN), o, lse, tiles, scale * LOG2E, T)
    return attn_fwd, (H, len(tiles)), args, dict(options, H=H, G=H // k.shape[1], BN=BN, CAUSAL=causal)


def _backward_delta(o, do, delta):
    T, H, D = o.shape
    options = dict(D=D, WIDE=triton.next_power_of_2(D), TILE=TILE, num_warps=8)
    return attn_delta, (H, triton.cdiv(T, TILE)), (o, do, delta, *o.stride()[:2], *do.stride()[:2], T), options


def _backward_q(q, k, v, do, lse, delta, dq, tiles, causal, scale):
    T, H, D = q.shape
    BN, options = _options("dq", q)
    args = (*_blocks(q, TILE), *_blocks(k, BN), *_blocks(v, BN), *_blocks(do, TILE), lse, delta, dq, tiles,
            scale * LOG2E, scale, T)
    return attn_bwd_q, (H, len(tiles)), args, dict(options, H=H, G=H // k.shape[1], BN=BN, CAUSAL=causal)


def _backward_kv(q, k, v, do, dq, lse, delta, dk, dv, tiles, causal, scale):
    """dk, dv (SPLIT, T, Hk, D). dq: fp32 and zeroed for the one-pass form, None for the other."""
    T, H, D = q.shape
    Hk, split = k.shape[1], len(dk)
    BM, options = _options("dkdv" if dq is None else "one pass", q)
    args = (*_blocks(q, BM), *_blocks(k, TILE), *_blocks(v, TILE), *_blocks(do, BM),
            *((None, None) if dq is None else _blocks(dq, BM)), lse, delta, dk, dv, tiles, scale * LOG2E, scale, T)
    options = dict(options, HK=Hk, G=H // Hk, SPLIT=split, BM=BM, CAUSAL=causal, ADD_DQ=dq is not None)
    return attn_bwd_kv, (Hk * split, len(tiles)), args, options


def _launch(kernel, grid, args, options):
    kernel[grid](*args, **options)


def _split(tiles: int, Hk: int, G: int) -> int:
    """Over how many programs the G heads of a key tile are spread: the fewest that give every SM four."""
    return next(s for s in range(1, G + 1) if G % s == 0 and (s == G or tiles * Hk * s >= 4 * SMS))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout, causal, scale, deterministic):
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)
        if len(q):
            _launch(*_forward(q, k, v, o, lse, layout.queries, causal, scale))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.rest = layout, causal, scale, deterministic
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        layout, causal, scale, deterministic = ctx.rest
        if not len(q):
            return *(torch.empty_like(x) for x in (q, k, v)), None, None, None, None
        do = _aligned(do)
        delta = torch.empty_like(lse)
        _launch(*_backward_delta(o, do, delta))
        split = _split(len(layout.keys), k.shape[1], q.shape[1] // k.shape[1])
        kind = k.dtype if split == 1 else torch.float32
        dk, dv = (torch.empty(split, *k.shape, dtype=kind, device=k.device) for _ in "kv")
        dq = torch.empty_like(o)
        if deterministic:
            _launch(*_backward_q(q, k, v, do, lse, delta, dq, layout.queries, causal, scale))
            _launch(*_backward_kv(q, k, v, do, None, lse, delta, dk, dv, layout.keys, causal, scale))
        else:
            total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
            _launch(*_backward_kv(q, k, v, do, total, lse, delta, dk, dv, layout.keys, causal, scale))
            torch.mul(total, scale, out=dq)
        dk, dv = (x[0] if split == 1 else x.sum(0).to(k.dtype) for x in (dk, dv))
        return dq, dk, dv, None, None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens, *, causal: bool, shared=None, scale: float | None = None,
              deterministic: bool = True, layout: Layout | None = None) -> Tensor:
    """softmax(q k^T * scale) v inside each sequence, in Triton. q (T, H, D), k and v (T, Hk, D) -> (T, H, D).

    cu_seqlens, shared: see make_layout; not looked at when `layout` is given. scale: D^-0.5 if None, positive.
    `causal` concerns a sequence itself; its prompt it sees whole. Strides of tokens and heads are free, in steps of 16
    bytes, else the input is copied. deterministic: which backward, see the top of this file; fp32 always is.
    """
    T, H, D = q.shape
    if k.shape != v.shape or k.shape[::2] != (T, D) or H % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected (T, H, D) and twice "
                         "(T, Hk, D), H a multiple of Hk")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: all three must be float32, float16 or bfloat16")
    layout = layout or make_layout(cu_seqlens, shared, q.device)
    if layout.cu[-1] != T or layout.queries.device != q.device:
        raise ValueError(f"layout covers {layout.cu[-1]} rows on {layout.queries.device}, q has {T} on {q.device}: "
                         "every row must belong to a sequence, also padding")
    deterministic = deterministic or q.dtype == torch.float32
    return _Attention.apply(q, k, v, layout, causal, D ** -0.5 if scale is None else scale, deterministic)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens, *, causal: bool, shared=None,
                        scale: float | None = None, deterministic: bool = True, layout: Layout | None = None) -> Tensor:
    """The twin of `attention` in plain PyTorch: sequence after sequence, scores written out. Any dtype and device."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    layout = layout or make_layout(cu_seqlens, shared)
    cu, G = layout.cu, q.shape[1] // k.shape[1]
    outputs = [q[:0]]
    for b, s in enumerate(layout.shared):
        own = torch.arange(cu[b], cu[b + 1], device=q.device)
        prompt = own[:0] if s < 0 else torch.arange(cu[s], cu[s + 1], device=q.device)
        seen = torch.cat((prompt, own))  # (N,) rows whose keys the n queries of this sequence may see
        keys, values = (x[seen].repeat_interleave(G, dim=1) for x in (k, v))  # (N, H, D)
        scores = torch.einsum("ihd,jhd->hij", q[own], keys) * scale  # (H, n, N)
        if causal:
            scores = scores.masked_fill(seen > own[:, None], float("-inf"))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), values))
    return torch.cat(outputs)


def configs():
    """Every shipped configuration as (name, kernel, arguments on "meta", options, allowances), for compile_check."""
    T, H, Hk = 8192, 16, 2
    half = [(dtype, D, causal) for dtype in (torch.bfloat16, torch.float16) for D in (64, 80, 128) for causal in (0, 1)]
    for dtype, D, causal in half + [(torch.float32, 80, 0), (torch.float32, 128, 1)]:
        q, k, wide, parts = (torch.empty(*shape, D, dtype=kind, device="meta") for shape, kind in (
            ((T, H), dtype), ((T, Hk), dtype), ((T, H), torch.float32), ((4, T, Hk), torch.float32)))
        lse = torch.empty(H, T, device="meta")
        tiles = torch.empty(80, 6, dtype=torch.int32, device="meta")
        for name, (kernel, _, args, options) in {
                "fwd": _forward(q, k, k, q, lse, tiles, bool(causal), 0.1),
                "delta": _backward_delta(q, q, lse),
                "bwd dQ": _backward_q(q, k, k, q, lse, lse, q, tiles, bool(causal), 0.1),
                "bwd dK dV": _backward_kv(q, k, k, q, None, lse, lse, parts, parts, tiles, bool(causal), 0.1),
                "bwd one pass": _backward_kv(q, k, k, q, wide, lse, lse, parts, parts, tiles, bool(causal), 0.1),
        }.items():
            allowed = dict(tensor_cores=False) if name == "delta" else {}
            if dtype == torch.float32:  # every operand in two parts: they do not fit the registers
                allowed["spills"] = 1000
            elif name == "bwd one pass" and D == 128:  # some 20 in each walk: of 255 registers dK and dV take 128
                allowed["spills"] = 64
            if dtype == torch.float32 and name == "bwd one pass":
                continue  # never launched
            yield f"attention {name} D{D} {str(dtype)[6:]}{' causal' * causal}", kernel, args, options, allowed
