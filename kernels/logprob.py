"""Log-probability of given tokens, and cross-entropy, without ever holding the matrix of logits. Copy freely.

Physics. logits = h W^T is one product of 2 K V E flops: 16384 tokens x 151936 words x 2048 are 10.2 Tflop, 13 ms of an
H200 at its measured 790 Tflop/s. Written out in fp32 the logits are 10 GB; log_softmax and its gradient make 30 GB of
them, and that is what ends a large micro-batch. But of a row only two numbers are wanted, its target's logit and its
log sum exp. So the product is made in chunks, each used up at once:

    forward    for each chunk of the vocabulary: x = h W_c^T (cuBLAS); fold x into a running max and sum of every row
    backward   the same x again, turned in place into g (onehot - softmax) / T; then dh += x W_c and dW_c = x^T h

The chunk runs over the VOCABULARY, not over tokens. So dW_c is one product over all tokens: summed in fp32 inside the
tensor cores, rounded once, written once. Chunks of tokens would add 32 times into an fp32 dW of 1.2 GB, 80 GB of
traffic, 18 ms. What is added up instead is dh, 134 MB in fp32 (left in bf16, such sums have made training worse). And
the backward needs no second look at a row, since its log-sum-exp is known.

Cost: 4 products, 1 forward and 3 backward; making x again costs a third more than keeping 10 GB. Traffic of the chunks
in fp32: 4 bytes written, 4 read, 2.5e9 times: 20 GB, 4.7 ms beside the 13. dtype=torch.bfloat16 halves that and rounds
a logit of 20 by up to 0.06, a third of the usual clip range in RL; so fp32 is the default. (On CUDA that is a product
of 16-bit factors with an fp32 result: torch 2.8 or later.) One kernel for product and fold would save the traffic and
must then beat cuBLAS; here the products run at cuBLAS's speed.

The two row kernels are memory-bound: a program a row, fp32 arithmetic, base-2 exponentials with the temperature folded
into their factor. Banned ids are one byte a word, read from L2: probability 0, gradient 0.

Letters: K tokens, V words, E width, C words of a chunk.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
CHUNK_BYTES = 2 ** 28       # of fp32 logits at once: 4096 words of 16384 tokens
BLOCK = 4096


@triton.jit
def _fold(X, TARGET, BANNED, MAX, SUM, PICKED, first, C, factor, HAS_BANNED: tl.constexpr, BLOCK: tl.constexpr):
    # X (K, C): logits of words first .. first + C - 1. MAX, SUM, PICKED (K,): running max, sum of 2^(x - max), the
    # target's logit, all of x = logit * factor, factor = log2(e) / temperature.
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(MAX + row)
    total = tl.load(SUM + row)
    for j in range(0, C, BLOCK):
        c = j + tl.arange(0, BLOCK)
        real = c < C
        if HAS_BANNED:
            real = real & (tl.load(BANNED + first + c, mask=real, other=1) == 0)
        x = tl.load(X + row * C + c, mask=real, other=float("-inf")).to(tl.float32) * factor
        m_new = tl.maximum(m, tl.max(x, 0))
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # all banned so far
        total = total * tl.math.exp2(m - finite) + tl.sum(tl.math.exp2(x - finite), 0)
        m = m_new
    tl.store(MAX + row, m)
    tl.store(SUM + row, total)
    t = tl.load(TARGET + row) - first
    here = (t >= 0) & (t < C)
    x = tl.load(X + row * C + t, mask=here, other=0.0).to(tl.float32) * factor
    if HAS_BANNED:
        x = tl.where(tl.load(BANNED + first + t, mask=here, other=0) == 0, x, float("-inf"))
    tl.store(PICKED + row, x, mask=here)


@triton.jit
def _gradient(X, TARGET, BANNED, LSE, G, first, C, factor, inverse_temperature, HAS_BANNED: tl.constexpr,
              BLOCK: tl.constexpr):
    # In place: X (K, C) logits -> d loss / d logits = G (onehot - softmax) / temperature. Each element is read and
    # written by the same thread. LSE (K,) in base 2, G (K,).
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(G + row) * inverse_temperature
    lse = tl.load(LSE + row)
    t = tl.load(TARGET + row) - first
    for j in range(0, C, BLOCK):
        c = j + tl.arange(0, BLOCK)
        real = c < C
        x = tl.load(X + row * C + c, mask=real, other=0.0).to(tl.float32) * factor
        d = g * (tl.where(c == t, 1.0, 0.0) - tl.math.exp2(x - lse))
        d = tl.where(g == 0, 0.0, d)  # a row that is not trained stays 0, whatever is in it
        if HAS_BANNED:
            d = tl.where(tl.load(BANNED + first + c, mask=real, other=1) == 0, d, 0.0)
        tl.store(X + row * C + c, d.to(X.dtype.element_ty), mask=real)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b as `dtype`, summed in fp32: 16-bit factors and fp32 result are one cuBLAS call."""
    if dtype == a.dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


def chunks(h: Tensor, weight: Tensor, dtype: torch.dtype):
    """-> (first word, logits (K, C)) of one chunk of the vocabulary after the other."""
    C = max(1024, CHUNK_BYTES // 4 // max(1, len(h)) // 128 * 128)
    for first in range(0, len(weight), C):
        yield first, product(h, weight[first:first + C].T, dtype).contiguous()


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, banned, temperature, dtype):
        def row(value):
            return torch.full(h.shape[:1], value, dtype=torch.float32, device=h.device)

        # A target outside the vocabulary is in no chunk and stays NaN.
        m, total, picked, has = row(float("-inf")), row(0.0), row(float("nan")), banned is not None
        for first, x in chunks(h, weight, dtype):
            _fold[(len(h),)](x, targets, banned if has else targets, m, total, picked, first, x.shape[1],
                             LOG2E / temperature, has, BLOCK, num_warps=8)
        lse = m + total.log2()
        ctx.save_for_backward(h, weight, targets, banned, lse)
        ctx.temperature, ctx.dtype = temperature, dtype
        return (picked - lse) / LOG2E

    @staticmethod
    def backward(ctx, g):
        h, weight, targets, banned, lse = ctx.saved_tensors
        has, (need_h, need_weight) = banned is not None, ctx.needs_input_grad[:2]
        dh = torch.zeros(h.shape, dtype=torch.float32, device=h.device) if need_h else None
        dw, g = torch.empty_like(weight) if need_weight else None, g.contiguous()
        for first, x in chunks(h, weight, ctx.dtype):
            _gradient[(len(h),)](x, targets, banned if has else targets, lse, g, first, x.shape[1],
                                 LOG2E / ctx.temperature, 1 / ctx.temperature, has, BLOCK, num_warps=8)
            words, x = slice(first, first + x.shape[1]), x.to(h.dtype)
            if need_h:
                dh += product(x, weight[words], torch.float32)
            if need_weight:
                dw[words] = product(x.T, h, torch.float32)
        return dh if dh is None else dh.to(h.dtype), dw, None, None, None, None


def token_logps(h: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, banned=(),
                dtype: torch.dtype = torch.float32) -> Tensor:
    """h (K, E), weight (V, E), targets (K,) int -> (K,) fp32: log softmax(h weight^T / temperature) at the target.

    banned: ids (list or tensor) of probability 0. Where a target is negative (-100) the result is 0, and its gradient.
    dtype: of the logits in a chunk. Gradients for h and weight, which have one dtype.
    """
    if not temperature > 0 or h.dtype != weight.dtype or targets.shape != h.shape[:1]:
        raise ValueError(f"temperature {temperature} must be above 0, h {h.dtype} and weight {weight.dtype} of one "
                         f"dtype, targets {tuple(targets.shape)} one for each of the {len(h)} rows of h")
    if len(banned):
        ids = torch.as_tensor(banned, dtype=torch.long, device=h.device)
        banned = torch.zeros(len(weight), dtype=torch.int8, device=h.device).index_fill_(0, ids, 1)
    else:
        banned = None
    logp = _LogProb.apply(h, weight, targets.contiguous(), banned, temperature, dtype)
    return torch.where(targets < 0, 0.0, logp)


def cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean", **options) -> Tensor:
    """Minus the mean ("mean") or sum ("sum") of token_logps over targets that are not negative; `options` as there."""
    total = -token_logps(h, weight, targets, **options).sum()
    return total if reduction == "sum" else total / (targets >= 0).sum()


def token_logps_reference(h: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, banned=(),
                          dtype: torch.dtype = torch.float32) -> Tensor:
    """The twin in plain PyTorch, for any device and dtype: the whole matrix of logits."""
    logits = (h @ weight.T).to(torch.promote_types(h.dtype, dtype)) / temperature
    if len(banned):
        logits = logits.index_fill(1, torch.as_tensor(banned, dtype=torch.long, device=h.device), float("-inf"))
    logp = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None].long()).squeeze(1)
    return torch.where(targets < 0, 0.0, logp)


def cross_entropy_reference(h: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean", **options):
    """The twin of cross_entropy."""
    total = -token_logps_reference(h, weight, targets, **options).sum()
    return total if reduction == "sum" else total / (targets >= 0).sum()


def configs():
    """For compile_check: (name, kernel, arguments, launch options, allowances). The products are cuBLAS's."""
    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    row, target, banned = meta(16384), meta(16384, dtype=torch.int64), meta(151936, dtype=torch.int8)
    options, none = dict(num_warps=8), dict(tensor_cores=False)
    for x in (meta(16384, 4096), meta(16384, 4096, dtype=torch.bfloat16)):
        fold = (x, target, banned, row, row, row, 4096, 4096, LOG2E, True, BLOCK)
        gradient = (x, target, banned, row, row, 4096, 4096, LOG2E, 1.0, True, BLOCK)
        yield f"logprob fold {str(x.dtype)[6:]}", _fold, fold, options, none
        yield f"logprob gradient {str(x.dtype)[6:]}", _gradient, gradient, options, none
