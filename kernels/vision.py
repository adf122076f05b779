"""Vision attention in Triton: windows of at most 64 patches with 2-D rotary fused into the loads, and full attention.

Needs torch and triton; `full_attention` alone also needs attention.py beside it. `vision_reference` is the twin of both
in plain PyTorch. On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before triton is first
imported).

THE PHYSICS OF A WINDOW. Qwen2.5-VL cuts an image into windows of 8 x 8 patches: 64 tokens, just the M of one WGMMA
product. A window of one head is one tile: no walk over keys, no running maximum, and backward needs only the inputs.

  Bytes    q, k, v in, o out: 4 x 80 x 2 = 640 bytes a token and head in bf16. 4096 patches, 16 heads: 42 MB, 10 us of
           an H200 at 4.3 TB/s. Backward reads 640 and writes 480.
  Products 4 x 64 x 80 = 20,480 operations a token and head, 32 a byte; the H200 balances at 790 / 4.3 = 184. So memory
           is the limit: a window's 41 KB take an SM some 2,300 clocks, its products 320, its exponentials 256.
  Rotary   as a kernel of its own reads and writes q and k once more, 640 bytes: twice the time. Done on the way from
           memory to the tensor cores it is free. The table, 2 x 40 fp32 numbers a token, serves HEADS heads in a row.
  Loads    plain pointers, not TMA: the values pass through registers to be turned, and windows at the border are
           ragged. Several programs share an SM, which is what keeps its memory requests coming.

A head of 80 turns as pairs (x_i, x_{i+40}), and a block of 40 columns does not exist. But a product over a head does
not care about the order of the columns, if both factors agree on it. So a head is read as blocks of powers of two:
      a = columns 0..31     b = columns 40..71     c = columns 32..39 and 72..79, 16 wide     d = c with halves swapped
a turns with b, c with d, which comes from the cache. Backward turns dq and dk back; one more product, with d, makes the
swapped columns that this needs.

FULL ATTENTION (4 of 32 layers, thousands of keys) visits a key tile many times. Turning it on each visit would cost
as much arithmetic as the softmax, so q and k are turned once and attention.py does the rest, 80 as 64 + 16.

Written without a GPU at hand: registers, shared memory and instructions are checked (python -m kernels.compile_check),
numbers too, speed is unmeasured.

Letters: P patches, H heads, D head width = 2 (N1 + N2), W windows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WINDOW = 64  # tokens a window may hold
LOG2E = 1.4426950408889634
FP32 = tl.constexpr("tf32x3")  # how tl.dot multiplies fp32: three TF32 products for one; nothing else changes


@triton.jit
def _columns(N1, N2):
    """Columns of the blocks a, b, c, d: (1, N1) twice, (1, 2 N2) twice."""
    a = tl.arange(0, N1)[None, :]
    if N2:
        i = tl.arange(0, 2 * N2)[None, :]
        c = N1 + i + tl.where(i < N2, 0, N1)
        d = N1 + (i ^ N2) + tl.where(i < N2, N1, 0)
        # said aloud, since the compiler cannot see it through `where`: runs of N2, so whole runs are read at once
        return (a, a + N1 + N2, tl.max_contiguous(tl.multiple_of(c, (1, N2)), (1, N2)),
                tl.max_contiguous(tl.multiple_of(d, (1, N2)), (1, N2)))
    else:
        return a, a + N1, a, a


@triton.jit
def _table(COS, SIN, rows, sc, ss, keep, N1, N2):
    """cos, sin that a and b turn by; cos, sin for c, whose first half turns like a and whose second half like b."""
    cos, sin = COS + rows * sc, SIN + rows * ss
    a = tl.arange(0, N1)[None, :]
    cos_a, sin_a = tl.load(cos + a, mask=keep, other=0.0), tl.load(sin + a, mask=keep, other=0.0)
    if N2:
        i = tl.arange(0, 2 * N2)[None, :]
        sign = tl.where(i < N2, -1.0, 1.0)
        i = N1 + i % N2
        return cos_a, sin_a, tl.load(cos + i, mask=keep, other=0.0), tl.load(sin + i, mask=keep, other=0.0) * sign
    else:
        return cos_a, sin_a, cos_a, sin_a


@triton.jit
def _load(X, at, keep, N1, N2):
    """Blocks a, b, c, d of a head; row i starts at element at[i]."""
    a, b, c, d = _columns(N1, N2)
    xa = tl.load(X + at + a, mask=keep, other=0.0)
    xb = tl.load(X + at + b, mask=keep, other=0.0)
    if N2:
        return xa, xb, tl.load(X + at + c, mask=keep, other=0.0), tl.load(X + at + d, mask=keep, other=0.0)
    else:
        return xa, xb, xa, xa


@triton.jit
def _turn(x, table, sign, N2):
    """Every pair by its angle (sign 1) or back (sign -1), in fp32. In d the angle has the other sign."""
    cos, sin, cos_c, sin_c = table
    a, b = x[0].to(tl.float32), x[1].to(tl.float32)
    c, d = x[2].to(tl.float32), x[3].to(tl.float32)
    if N2:
        c, d = c * cos_c + d * (sign * sin_c), d * cos_c - c * (sign * sin_c)
    return a * cos - b * (sign * sin), b * cos + a * (sign * sin), c, d


@triton.jit
def _cast(x, dtype):
    return x[0].to(dtype), x[1].to(dtype), x[2].to(dtype), x[3].to(dtype)


@triton.jit
def _outer(x, y, N2):
    """x y^T over the head."""
    s = tl.dot(x[0], y[0].T, input_precision=FP32)
    s = tl.dot(x[1], y[1].T, s, input_precision=FP32)
    if N2:
        s = tl.dot(x[2], y[2].T, s, input_precision=FP32)
    return s


@triton.jit
def _product(w, x, N2, SWAPPED):
    """w x, block by block; block d only if SWAPPED."""
    w = w.to(x[0].dtype)
    a = tl.dot(w, x[0], input_precision=FP32)
    b = tl.dot(w, x[1], input_precision=FP32)
    c, d = a, a
    if N2:
        c = tl.dot(w, x[2], input_precision=FP32)
        d = tl.dot(w, x[3], input_precision=FP32) if SWAPPED else c
    return a, b, c, d


@triton.jit
def _store(Y, at, y, keep, N1, N2):
    a, b, c, _ = _columns(N1, N2)
    tl.store(Y + at + a, y[0].to(Y.dtype.element_ty), mask=keep)
    tl.store(Y + at + b, y[1].to(Y.dtype.element_ty), mask=keep)
    if N2:
        tl.store(Y + at + c, y[2].to(Y.dtype.element_ty), mask=keep)


@triton.jit
def _softmax(q, k, n, scale, N2, ROWS):
    s = tl.where(tl.arange(0, ROWS)[None, :] < n, _outer(q, k, N2) * scale, -1e30)  # finite: a window may be empty
    p = tl.math.exp2(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def window_fwd(QKV, COS, SIN, CU, O, sq_t, sq_part, sq_h, sc, ss, scale, H: tl.constexpr, HEADS: tl.constexpr,
               N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr):
    """One window, HEADS heads, one after the other. scale: softmax scale times log2(e)."""
    lo = tl.load(CU + tl.program_id(1))
    n = tl.load(CU + tl.program_id(1) + 1) - lo
    rows = (lo + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    keep = tl.arange(0, ROWS)[:, None] < n
    table = _table(COS, SIN, rows, sc, ss, keep, N1, N2)
    for h in range(tl.program_id(0) * HEADS, tl.program_id(0) * HEADS + HEADS):
        at = rows * sq_t + h * sq_h
        q = _cast(_turn(_load(QKV, at, keep, N1, N2), table, 1, N2), QKV.dtype.element_ty)
        k = _cast(_turn(_load(QKV, at + sq_part, keep, N1, N2), table, 1, N2), QKV.dtype.element_ty)
        v = _load(QKV, at + 2 * sq_part, keep, N1, N2)
        o = _product(_softmax(q, k, n, scale, N2, ROWS), v, N2, False)
        _store(O, (rows * H + h) * (2 * N1 + 2 * N2), o, keep, N1, N2)


@triton.jit
def window_bwd(QKV, COS, SIN, CU, DO, DQKV, sq_t, sq_part, sq_h, sc, ss, sd_t, sd_h, scale, sm_scale, H: tl.constexpr,
               HEADS: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr):
    """The same walk; P again from q and k, the gradients by the five products of attention.py. DQKV (P, 3, H, D)."""
    lo = tl.load(CU + tl.program_id(1))
    n = tl.load(CU + tl.program_id(1) + 1) - lo
    rows = (lo + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    keep = tl.arange(0, ROWS)[:, None] < n
    table = _table(COS, SIN, rows, sc, ss, keep, N1, N2)
    D: tl.constexpr = 2 * N1 + 2 * N2
    for h in range(tl.program_id(0) * HEADS, tl.program_id(0) * HEADS + HEADS):
        at = rows * sq_t + h * sq_h
        q = _cast(_turn(_load(QKV, at, keep, N1, N2), table, 1, N2), QKV.dtype.element_ty)
        k = _cast(_turn(_load(QKV, at + sq_part, keep, N1, N2), table, 1, N2), QKV.dtype.element_ty)
        v = _load(QKV, at + 2 * sq_part, keep, N1, N2)
        do = _load(DO, rows * sd_t + h * sd_h, keep, N1, N2)
        p = _softmax(q, k, n, scale, N2, ROWS)  # a row behind the window has do = 0: it adds nothing below
        dp = _outer(do, v, N2)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * sm_scale
        out = (rows * 3 * H + h) * D
        _store(DQKV, out, _turn(_product(ds, k, N2, True), table, -1, N2), keep, N1, N2)
        _store(DQKV, out + H * D, _turn(_product(ds.T, q, N2, True), table, -1, N2), keep, N1, N2)
        _store(DQKV, out + 2 * H * D, _product(p.T, do, N2, False), keep, N1, N2)


# ---------------------------------------------------------------- host
def _launches(qkv: Tensor, cos: Tensor, sin: Tensor, cu: Tensor, o: Tensor, dqkv: Tensor | None = None) -> tuple:
    """-> kernel, grid, arguments, options, for a launch and for compile_check. With dqkv: backward, and o is dO."""
    _, _, H, D = qkv.shape
    N1 = 1 << ((D // 2).bit_length() - 1)
    N2 = D // 2 - N1
    if D % 2 or D < 32 or N2 & N2 - 1 or 0 < N2 < 8:
        raise ValueError(f"head width {D}: half of it must be a power of two from 16 on, or that plus one from 8 on "
                         "(40 = 32 + 8)")
    strides, scale = (*qkv.stride()[:3], cos.stride(0), sin.stride(0)), D ** -0.5
    if dqkv is None:
        kernel, args = window_fwd, (qkv, cos, sin, cu, o, *strides, scale * LOG2E)
        heads, stages = next(n for n in (4, 2, 1) if H % n == 0), 2
    else:  # one head a program: the table would stay in registers that backward does not have
        kernel, args = window_bwd, (qkv, cos, sin, cu, o, dqkv, *strides, *o.stride()[:2], scale * LOG2E, scale)
        heads, stages = 1, 1
    options = dict(H=H, HEADS=heads, N1=N1, N2=N2, ROWS=WINDOW, num_warps=4, num_stages=stages)
    return kernel, (H // heads, len(cu) - 1), args, options


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, cu):
        o = torch.empty(len(qkv), *qkv.shape[2:], dtype=qkv.dtype, device=qkv.device)
        if len(qkv):
            kernel, grid, args, options = _launches(qkv, cos, sin, cu, o)
            kernel[grid](*args, **options)
        ctx.save_for_backward(qkv, cos, sin, cu)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        qkv, cos, sin, cu = ctx.saved_tensors
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        if len(qkv):
            kernel, grid, args, options = _launches(qkv, cos, sin, cu, _dense(do), dqkv)
            kernel[grid](*args, **options)
        return dqkv, None, None, None


def window_attention(qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens) -> Tensor:
    """Attention inside each window, q and k turned. qkv (P, 3, H, D), cos and sin (P, D/2) fp32 -> (P, H, D).

    cu_seqlens (W + 1): list or integer tensor, 0 = cu[0] <= ... <= cu[W] = P, steps of at most 64. Checked on the CPU;
    a tensor on a GPU is trusted, since looking at it would stop the GPU. Differentiable in qkv.
    """
    P, three, H, D = qkv.shape
    if three != 3 or cos.shape != (P, D // 2) or sin.shape != cos.shape:
        raise ValueError(f"qkv {tuple(qkv.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: expected "
                         "(P, 3, H, D) and twice (P, D/2)")
    cu = torch.as_tensor(cu_seqlens)
    if cu.device.type == "cpu" and (cu[0] != 0 or cu[-1] != P or ((cu.diff() < 0) | (cu.diff() > WINDOW)).any()):
        raise ValueError(f"cu_seqlens must run from 0 to {P} in steps of at most {WINDOW}, got {cu.tolist()}")
    return _Window.apply(_dense(qkv), _dense(cos), _dense(sin), cu.to(qkv.device, torch.int32))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pair (x_i, x_{i + D/2}) by the angle of i. x (P, H, D), cos and sin (P, D/2) -> like x."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def full_attention(qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens, *, layout=None) -> Tensor:
    """The same function for sequences of any length (whole images); layout: see attention.make_layout."""
    from .attention import attention

    q, k, v = qkv.unbind(1)  # each (P, H, D)
    return attention(rotate(q, cos, sin), rotate(k, cos, sin), v, cu_seqlens, causal=False, layout=layout)


def vision_reference(qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens) -> Tensor:
    """The twin of both in plain PyTorch: one window after the other, scores written out. Any dtype and device."""
    q, k, v = qkv.unbind(1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    cu = torch.as_tensor(cu_seqlens).tolist()
    outputs = [q[:0]]
    for lo, hi in zip(cu, cu[1:]):
        p = torch.einsum("ihd,jhd->hij", q[lo:hi], k[lo:hi]).mul(q.shape[2] ** -0.5).softmax(-1)  # (H, n, n)
        outputs.append(torch.einsum("hij,jhd->ihd", p, v[lo:hi]))
    return torch.cat(outputs)


def configs():
    """Every shipped configuration as (name, kernel, arguments on "meta", options, allowances), for compile_check."""
    cos, cu = torch.empty(4096, 40, device="meta"), torch.empty(65, dtype=torch.int32, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in (64, 80):
            qkv, o = (torch.empty(4096, *shape, 16, D, dtype=dtype, device="meta") for shape in ((3,), ()))
            for name, grad in (("fwd", None), ("bwd", qkv)):
                kernel, _, args, options = _launches(qkv, cos, cos, cu, o, grad)
                allowed = dict(spills=1000) if dtype == torch.float32 else {}  # for checking, not for speed
                yield f"window {name} D{D} {str(dtype)[6:]}", kernel, args, options, allowed
