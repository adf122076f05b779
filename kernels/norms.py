"""RMSNorm (with the residual sum), rotary positions (multimodal and 2-D) and SwiGLU: forward and backward. Copy freely.

Physics. There is no matrix product here: every number is read, touched by a handful of instructions and written. An
H200 moves 4.3 TB/s and computes 60 Tflop/s in fp32, 14 operations a byte; these kernels need one or two. So memory is
the limit, bytes are what counts, and the best possible kernel is as fast as a copy. Bytes an element, 2-byte dtypes:

    operation                     separate PyTorch operations                  one kernel
    x + residual, then RMSNorm    the sum 6, then cast, square, mean, ...: 20  read 4, write 4 (the sum and its norm): 8
    its backward                  30                                           read dy, ds, sum, write dx: 8
    rotary                        halves, swap, two products, a sum: 14        read 2, write 2: 4
    silu(gate) * up               2 + 2, then 4 + 2: 10                        read 4, write 2: 6
    its backward                  18                                           read 6, write 4: 10

torch.compile finds most of this by itself; read these kernels to see what it has to find.

1. RMSNorm. A program owns whole rows, so the mean of squares never leaves its registers. y = z w with z = x / rms, and
   dx = (g - z mean(g z)) / rms with g = w dy. The backward makes z again from the sum (kept anyway: it is the next
   residual) and one number a row. The weight's gradient is a sum over all rows: each of at most PROGRAMS programs walks
   over its share with a running sum in registers and writes it once; PyTorch adds those PROGRAMS rows. There are no
   atomics, so every run gives the same bits.
2. Rotary. The pair (x_i, x_{i + D/2}) of a head turns by an angle that depends on a position. Qwen2.5-VL gives a token
   three positions (time, row, column) and deals the pairs out to them, 16, 24 and 24 at D = 128; its vision tower has
   two (row, column), half of the pairs each. That is one kernel with two `axis` lists. Cosines and sines come from a
   table over positions (4096 x 64 pairs: 2 MB, at home in the 50 MB L2), loaded once for all heads of a token. The
   backward is the same kernel turning the other way, since a rotation's transpose is its inverse.
3. SwiGLU. The backward computes silu again: an exponential is cheaper than two bytes.

Arithmetic is fp32 whatever the tensors hold; a result is rounded once, when it is stored.
Letters: N rows (tokens), E width, H heads, D head width, A position axes, F hidden width.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528  # for the weight-gradient sum: four for each of 132 SMs
TILE = 4096     # elements of a tensor that a program holds at once, 16 registers a thread


def as_rows(x: Tensor) -> Tensor:
    """(..., E) -> (N, E) with neighbouring elements in a row; copies only where the last axis is strided."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def tile(N: int, *axes: int) -> tuple[int, ...]:
    """-> rows a program, then each axis rounded up to a power of two, which tl.arange demands."""
    axes = [triton.next_power_of_2(n) for n in axes]
    room = max(1, TILE // torch.Size(axes).numel())
    return min(room, triton.next_power_of_2(max(N, 1))), *axes


def fresh(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)  # contiguous, unlike empty_like of a strided x


# ------------------------------------------------------------------------------------------------------------ RMSNorm

@triton.jit
def _norm_forward(X, R, W, Y, S, INVERSE, N, x_row, r_row, eps, E: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, RESIDUAL: tl.constexpr):
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # 64 bits: 16384 x 152064 elements pass 2^31
    e = tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (e < E)[None, :]
    out = n[:, None] * E + e[None, :]
    x = tl.load(X + n[:, None] * x_row + e[None, :], mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(R + n[:, None] * r_row + e[None, :], mask=inside, other=0.0).to(tl.float32)
        s = x.to(S.dtype.element_ty)
        tl.store(S + out, s, mask=inside)
        x = s.to(tl.float32)  # norm the rounded sum: what the next layer reads, and what the backward has
    inverse = tl.rsqrt(tl.sum(x * x, 1) / E + eps)
    w = tl.load(W + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(Y + out, (x * inverse[:, None] * w[None, :]).to(Y.dtype.element_ty), mask=inside)
    tl.store(INVERSE + n, inverse, mask=n < N)


@triton.jit
def _norm_backward(DY, DS, S, W, INVERSE, DX, DW, N, dy_row, ds_row, s_row, E: tl.constexpr, ROWS: tl.constexpr,
                   COLUMNS: tl.constexpr, RESIDUAL: tl.constexpr):
    e = tl.arange(0, COLUMNS)
    w = tl.load(W + e, mask=e < E, other=0.0).to(tl.float32)
    dw = tl.zeros([COLUMNS], tl.float32)
    for t in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        n = (t * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (n < N)[:, None] & (e < E)[None, :]
        inverse = tl.load(INVERSE + n, mask=n < N, other=0.0)[:, None]
        z = tl.load(S + n[:, None] * s_row + e[None, :], mask=inside, other=0.0).to(tl.float32) * inverse
        dy = tl.load(DY + n[:, None] * dy_row + e[None, :], mask=inside, other=0.0).to(tl.float32)
        dw += tl.sum(dy * z, 0)
        g = dy * w[None, :]
        dx = (g - z * (tl.sum(g * z, 1) / E)[:, None]) * inverse
        if RESIDUAL:
            dx += tl.load(DS + n[:, None] * ds_row + e[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + n[:, None] * E + e[None, :], dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(DW + tl.program_id(0) * E + e, dw, mask=e < E)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        (N, E), has = x.shape, residual is not None
        y, r, inverse = fresh(x), residual if has else x, x.new_empty(N, dtype=torch.float32)
        s = fresh(x) if has else x
        rows, columns = tile(N, E)
        _norm_forward[(triton.cdiv(N, rows),)](x, r, weight, y, s, inverse, N, x.stride(0), r.stride(0), eps, E, rows,
                                               columns, has, num_warps=8)
        ctx.save_for_backward(s, weight, inverse)
        return (y, s) if has else y

    @staticmethod
    def backward(ctx, dy, ds=None):
        s, weight, inverse = ctx.saved_tensors
        (N, E), has, dy = s.shape, ds is not None, as_rows(dy)
        ds = as_rows(ds) if has else dy
        rows, columns = tile(N, E)
        programs = min(PROGRAMS, triton.cdiv(N, rows))
        dx, dw = fresh(s), weight.new_empty(programs, E, dtype=torch.float32)
        _norm_backward[(programs,)](dy, ds, s, weight, inverse, dx, dw, N, dy.stride(0), ds.stride(0), s.stride(0), E,
                                    rows, columns, has, num_warps=8)
        return dx, dx if has else None, dw.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None):
    """x (..., E) -> x / rms(x) * weight; with a residual (..., E): the norm of x + residual, and x + residual."""
    if residual is None:
        return _RMSNorm.apply(as_rows(x), None, weight, eps).view(x.shape)
    return tuple(out.view(x.shape) for out in _RMSNorm.apply(as_rows(x), as_rows(residual), weight, eps))


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None):
    """The twin in plain PyTorch, for any device and dtype."""
    s = x if residual is None else x + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    y = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(s.dtype)
    return y if residual is None else (y, s)


# ------------------------------------------------------------------------------------------------------------- rotary

@triton.jit
def _rotary(X, COS, SIN, POSITION, AXIS, Y, N, x_token, x_head, cos_row, sin_row, turn, H: tl.constexpr,
            HALF: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, GATHER: tl.constexpr):
    n = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    h = tl.arange(0, HEADS)
    i = tl.arange(0, PAIRS)
    inside = (n < N)[:, None] & (i < HALF)[None, :]  # (TOKENS, PAIRS)
    if GATHER:  # which of the token's positions turns pair i, and where that position is
        axis = tl.load(AXIS + i, mask=i < HALF, other=0)
        row = tl.load(POSITION + axis[None, :] * N + n[:, None], mask=inside, other=0)
    else:
        row = n[:, None]
    c = tl.load(COS + row * cos_row + i[None, :], mask=inside, other=0.0).to(tl.float32)[:, None, :]
    s = tl.load(SIN + row * sin_row + i[None, :], mask=inside, other=0.0).to(tl.float32)[:, None, :] * turn
    here = inside[:, None, :] & (h < H)[None, :, None]  # (TOKENS, HEADS, PAIRS)
    x = X + n[:, None, None] * x_token + h[None, :, None] * x_head + i[None, None, :]
    y = Y + (n[:, None, None] * H + h[None, :, None]) * (2 * HALF) + i[None, None, :]
    a = tl.load(x, mask=here, other=0.0).to(tl.float32)
    b = tl.load(x + HALF, mask=here, other=0.0).to(tl.float32)
    tl.store(y, (a * c - b * s).to(Y.dtype.element_ty), mask=here)
    tl.store(y + HALF, (b * c + a * s).to(Y.dtype.element_ty), mask=here)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, positions, axis, turn):
        x = x if x.stride(2) == 1 else x.contiguous()
        N, H, D = x.shape
        y, gather = fresh(x), positions is not None
        tokens, heads, pairs = tile(N, H, D // 2)
        _rotary[(triton.cdiv(N, tokens),)](x, cos, sin, positions if gather else x, axis if gather else x, y, N,
                                           x.stride(0), x.stride(1), cos.stride(0), sin.stride(0), turn, H, D // 2,
                                           tokens, heads, pairs, gather, num_warps=4)
        ctx.save_for_backward(cos, sin, positions, axis)
        ctx.turn = turn
        return y

    @staticmethod
    def backward(ctx, dy):
        return _Rotary.apply(dy, *ctx.saved_tensors, -ctx.turn), None, None, None, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    """x (N, H, D), cos and sin (M, D/2) -> (N, H, D): pair (x_i, x_{i + D/2}) of every head turned by the angle of i.

    Without positions, row n of the tables is for token n. With positions (A, N) and axis (D/2,), both int: pair i of
    token n turns by row positions[axis[i], n]. Multimodal at D = 128: axis 16 x 0, 24 x 1, 24 x 2; 2-D: half and half.
    Gradient for x only. From qkv (N, 3, H, D), qkv[:, :2].flatten(1, 2) turns q and k in one launch.
    """
    cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
    positions, axis = (t if t is None else t.contiguous() for t in (positions, axis))
    return _Rotary.apply(x, cos, sin, positions, axis, 1.0)


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, axis: Tensor | None = None):
    """The twin in plain PyTorch."""
    if positions is not None:
        row, i = positions[axis].T, torch.arange(cos.shape[1], device=cos.device)  # (N, D/2), (D/2,)
        cos, sin = cos[row, i], sin[row, i]
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------- SwiGLU

@triton.jit
def _swiglu(G, U, DY, Y, DG, DU, N, F, g_row, u_row, dy_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            BACKWARD: tl.constexpr):
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    f = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (n < N) & (f < F)
    g = tl.load(G + n * g_row + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(U + n * u_row + f, mask=inside, other=0.0).to(tl.float32)
    gate = tl.sigmoid(g)
    if BACKWARD:
        dy = tl.load(DY + n * dy_row + f, mask=inside, other=0.0).to(tl.float32)
        tl.store(DG + n * F + f, (dy * u * gate * (1 + g * (1 - gate))).to(DG.dtype.element_ty), mask=inside)
        tl.store(DU + n * F + f, (dy * g * gate).to(DU.dtype.element_ty), mask=inside)
    else:
        tl.store(Y + n * F + f, (g * gate * u).to(Y.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def launch(gate, up, dy, outputs, backward):
        (N, F), (rows, columns) = gate.shape, tile(len(gate), min(gate.shape[1], 1024))
        _swiglu[(triton.cdiv(N, rows), triton.cdiv(F, columns))](
            gate, up, dy, outputs[0], *outputs[-2:], N, F, gate.stride(0), up.stride(0), dy.stride(0), rows, columns,
            backward, num_warps=8)
        return outputs

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _SwiGLU.launch(gate, up, gate, (fresh(gate),) * 2, False)[0]

    @staticmethod
    def backward(ctx, dy):
        return _SwiGLU.launch(*ctx.saved_tensors, as_rows(dy), (fresh(dy), fresh(dy)), True)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, (..., F). Both may be halves of one wider product."""
    return _SwiGLU.apply(as_rows(gate), as_rows(up)).view(gate.shape)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The twin in plain PyTorch."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


# ---------------------------------------------------------------------------------------------------- shipped settings

def configs():
    """For compile_check: (name, kernel, arguments, launch options, allowances) at the shapes of 3B and 7B."""
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    none = dict(tensor_cores=False)  # there are no products
    for size, N, E in (("vision", 4096, 1280), ("3B", 16384, 2048), ("7B", 16384, 3584)):
        x, w, inverse, dw = meta(N, E), meta(E), meta(N, dtype=torch.float32), meta(PROGRAMS, E, dtype=torch.float32)
        yield (f"RMSNorm + residual fwd {size}", _norm_forward,
               (x, x, w, x, x, inverse, N, E, E, 1e-6, E, *tile(N, E), True), dict(num_warps=8), none)
        yield (f"RMSNorm + residual bwd {size}", _norm_backward,
               (x, x, x, w, inverse, x, dw, N, E, E, E, E, *tile(N, E), True), dict(num_warps=8), none)
    for name, N, H, D, gather in (("multimodal 3B", 16384, 16, 128, True), ("2-D vision", 4096, 32, 80, True),
                                  ("from tables 7B", 16384, 28, 128, False)):
        x, half, index = meta(N, H, D), D // 2, meta(3, N, dtype=torch.int64)
        table = meta(4096, half, dtype=torch.float32)
        args = (x, table, table, index, index, x, N, H * D, D, half, half, 1.0, H, half, *tile(N, H, half), gather)
        yield f"rotary {name}", _rotary, args, dict(num_warps=4), none
    for size, F in (("3B", 11008), ("7B", 18944)):
        x = meta(16384, F)
        for backward in (False, True):
            yield (f"SwiGLU {'bwd' if backward else 'fwd'} {size}", _swiglu,
                   (x, x, x, x, x, x, 16384, F, F, F, F, *tile(16384, 1024), backward), dict(num_warps=8), none)
