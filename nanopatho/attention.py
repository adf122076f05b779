"""The one attention function every model of this repository calls, its one mask builder, rotary rotation and SwiGLU.

Contract: q (B, Hq, Tq, D), k and v (B, Hk, Tk, D) -> (B, Hq, Tq, D), scale D^-0.5, softmax over the keys. Hq is a
multiple of Hk; query head h reads key head h // (Hq / Hk) (grouped-query attention, arXiv 2305.13245).

Two paths lead to the same numbers: PyTorch's scaled_dot_product_attention, and the Triton kernels of kernels/.
`kernels_for` chooses and says so once: kernels for 16-bit tensors on an H100 or H200, PyTorch elsewhere. The variable
NANOPATHO_KERNELS=off (or on) forces one of them, as does `force`. May be copied alone: without kernels/ there
is the plain path, which needs torch only.

Letters: B batch, T tokens, H heads (Hq query, Hk key/value heads), D head width, P packed tokens, S segments, L
segment length.
"""

import importlib.util
import os
import sys
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------- which path, and why

_choice = os.environ.get("NANOPATHO_KERNELS", "auto")  # auto, on, off
WIDTHS = 16, 32, 64, 80, 128  # of heads, that are compiled and tested


def force(choice: str):
    """on: kernels wherever there is one for the case, also in Triton's interpreter. off: never. auto: by device."""
    global _choice
    if choice not in ("auto", "on", "off"):
        raise ValueError(f"NANOPATHO_KERNELS={choice!r}: choose auto, on or off")
    _choice = choice


force(_choice)


@lru_cache
def choose(choice: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """-> whether kernels serve tensors of this device and dtype, and why."""
    if importlib.util.find_spec("kernels") is None or importlib.util.find_spec("triton") is None:
        reason = "kernels/ or the triton package is not there"
    elif device.type != "cuda":
        import triton
        if triton.knobs.runtime.interpret:
            return True, "forced on, in Triton's interpreter"
        reason = f"this is a {device.type}, and kernels need CUDA, or TRITON_INTERPRET=1 set before Python starts"
    elif choice == "on":
        return True, "forced on"
    elif torch.cuda.get_device_capability(device) != (9, 0):
        reason = f"tiles are made for an H100 or H200, this is {torch.cuda.get_device_name(device)}; force them with on"
    elif dtype not in (torch.bfloat16, torch.float16):
        reason = f"{dtype} has no exact products on tensor cores; bfloat16 has kernels"
    else:
        return True, torch.cuda.get_device_name(device)
    if choice == "on":
        raise RuntimeError(f"NANOPATHO_KERNELS=on is impossible: {reason}")
    return False, reason


@lru_cache
def say(*line):
    """Once a process for every different line, on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(*line, file=sys.stderr)


def kernels_for(x: Tensor, case: str = "", served: bool = True) -> bool:
    """Should this call take a kernel? `served`: is there one for the case, which is named when it is said why not."""
    if _choice == "off":
        kernels, why = False, "kernels are forced off"
    elif _choice == "auto" and not x.is_cuda:
        kernels, why = False, f"this is a {x.device.type}, and kernels need CUDA"
    else:
        kernels, why = _call(choose, _choice, x.device, x.dtype)
    if not torch.compiler.is_compiling():
        say(f"attention: {'Triton kernels' if kernels else 'plain PyTorch'} ({why})")
        if kernels and not served:
            say(f"attention: plain PyTorch for {case}, which has no kernel")
    return kernels and served


def small_kernels(x: Tensor):
    """kernels/norms.py if it is to compute RMSNorm, rotation and SwiGLU of x, else None. torch.compile fuses these by
    itself, and a kernel would cut its graph."""
    if torch.compiler.is_compiling() or not kernels_for(x):
        return None
    from kernels import norms
    return norms


@lru_cache(maxsize=64)
def layout(sizes: tuple[int, ...], shared: tuple[int, ...] | None, device: torch.device):
    """The plan of kernels/attention.py for sequences of these sizes, end to end; shared: see `packed_attention`."""
    from kernels.attention import make_layout
    return make_layout([0, *accumulate(sizes)], shared, device)


@lru_cache(maxsize=64)
def bounds(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)


# Each is a graph break for torch.compile, which compiles everything between two of them. torch.compiler.disable is not
# written as a decorator: it would import the compiler, seconds, in every program.


def _packed(q: Tensor, k: Tensor, v: Tensor, causal: bool, sizes: tuple[int, ...], shared=None) -> Tensor:
    from kernels.attention import attention as kernel
    return kernel(q, k, v, None, causal=causal, layout=layout(sizes, shared, q.device))


def _decode(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    from kernels.decode import decode
    return decode(q, k, v, keep=keep)


def _cascade(q, shared_k, shared_v, k, v, lengths, keep, starts, most) -> Tensor:
    from kernels.decode import cascade
    return cascade(q, shared_k, shared_v, k, v, lengths, prompt_keep=keep, starts=starts, most=most)


def _vision(qkv: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, ...]) -> Tensor:
    from kernels import vision
    half = cos.shape[-1] // 2  # the kernels take each angle once, and no sign in sin
    tables = cos[:, 0, :half], sin[:, 0, half:]
    if max(sizes) <= vision.WINDOW:
        return vision.window_attention(qkv, *tables, bounds(sizes, qkv.device))
    return vision.full_attention(qkv, *tables, None, layout=layout(sizes, None, qkv.device))


def _call(function, *args):
    return torch.compiler.disable(function)(*args) if torch.compiler.is_compiling() else function(*args)


# ----------------------------------------------------------------------------------------------------------- attention


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    causal: query i sees keys 0..i; needs Tq == Tk. mask: bool, broadcastable to (B, 1, Tq, Tk), True = may look; it
    replaces `causal` (give one of the two: SDPA given both has returned wrong results in several public code bases).
    """
    B, Hq, Tq, D = q.shape
    Hk, Tk = k.shape[1:3]
    if causal and (mask is not None or Tq != Tk):
        raise ValueError("causal attention takes no mask and as many queries as keys, "
                         f"got {'a' if mask is not None else 'no'} mask, {Tq=}, {Tk=}")
    step = Tq == 1 and D != 80 and (mask is None or mask.shape[1:3] == (1, 1)) and not q.requires_grad
    if kernels_for(q, f"{Tq} queries, {Tk} keys, {'a' if mask is not None else 'no'} mask, width {D}",
                   D in WIDTHS and (step or mask is None and Tq == Tk)):
        if step:  # of decoding; that kernel has no backward
            return _call(_decode, q[:, :, 0], k, v, None if mask is None else mask[:, 0, 0].expand(B, Tk))[:, :, None]
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, H, D), views of what a projection made
        return _call(_packed, *rows, causal, (Tq,) * B).view(B, Tq, Hq, D).transpose(1, 2)
    if Tq == 1 and Hq != Hk:  # decoding: the heads of a group become queries of one head, so k and v are never repeated
        q = q.reshape(B, Hk, Hq // Hk, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, Hq, 1, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=Hq != Hk)


def padded_causal_mask(valid: Tensor, Tq: int | None = None) -> Tensor:
    """valid (B, Tk) bool, True at real tokens -> (B, 1, Tq, Tk) bool for the last Tq positions.

    Each sees the real tokens before it, and itself. A padding query must see something: a softmax over nothing is NaN,
    and NaN times zero reaches the gradients.
    """
    Tk = valid.shape[1]
    i = torch.arange(Tk, device=valid.device)
    query = i[Tk - (Tq or Tk):, None]  # (Tq, 1)
    return ((valid[:, None] & (i <= query)) | (i == query))[:, None]  # (B, 1, Tq, Tk)


class Segments(NamedTuple):
    """How P packed tokens fall into segments that do not see each other. Build with `segments`."""

    length: int | None  # the one length when all segments are equally long
    groups: tuple[Tensor, ...]  # otherwise, for every distinct length, (S, L) token indices
    inverse: Tensor | None  # (P,) where each token ended up after concatenating the groups
    sizes: tuple[int, ...]  # all lengths in order


def segments(lengths: list[int], device=None) -> Segments:
    """Plan for `segment_attention`: equally long segments become one batched call, others one for each length."""
    if len(set(lengths)) == 1:
        return Segments(lengths[0], (), None, tuple(lengths))
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    groups = tuple(starts[sizes == L, None] + torch.arange(L) for L in sorted(set(lengths)))  # each (S, L)
    inverse = torch.cat([g.flatten() for g in groups]).argsort()
    return Segments(None, tuple(g.to(device) for g in groups), inverse.to(device), tuple(lengths))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, plan: Segments, causal: bool = False) -> Tensor:
    """Attention inside each segment. q (P, Hq, D), k and v (P, Hk, D) -> (P, Hq, D)."""
    P, H, D = q.shape
    if kernels_for(q, f"heads of width {D}", D in WIDTHS):
        return _call(_packed, q, k, v, causal, plan.sizes)
    if plan.length:
        q, k, v = (x.unflatten(0, (-1, plan.length)).transpose(1, 2) for x in (q, k, v))  # (S, H, L, D)
        return attention(q, k, v, causal=causal).transpose(1, 2).reshape(P, H, D)
    parts = [attention(*(x[index].transpose(1, 2) for x in (q, k, v)), causal=causal) for index in plan.groups]
    return torch.cat([part.transpose(1, 2).reshape(-1, H, D) for part in parts])[plan.inverse]


class Documents:
    """In the place of the decoder's KV cache: one row holds documents of these sizes, each causal and for itself."""

    length = 0  # Decoder counts tokens here; nobody asks

    def __init__(self, sizes: list[int], device):
        self.plan = segments(sizes, device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        """q (1, Hq, P, D), k and v (1, Hk, P, D) -> (1, Hq, P, D)."""
        return _call(self.inside, q, k, v)  # outside of torch.compile's graphs, or every plan would need one of its own

    def inside(self, *qkv: Tensor) -> Tensor:
        return segment_attention(*(x[0].transpose(0, 1) for x in qkv), self.plan, causal=True).transpose(0, 1)[None]


def vision_attention(qkv: Tensor, cos: Tensor, sin: Tensor, plan: Segments) -> Tensor:
    """Rotate q and k, then `segment_attention`: qkv (P, 3, H, D), cos and sin (P, 1, D) -> (P, H, D).

    One call, because the kernel for windows turns q and k on their way from memory.
    """
    if kernels_for(qkv, f"heads of width {qkv.shape[3]}", qkv.shape[3] in WIDTHS):
        return _call(_vision, qkv, cos, sin, plan.sizes)
    q, k, v = qkv.unbind(1)
    return segment_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, plan)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, ...], shared: tuple[int, ...]) -> Tensor:
    """Causal attention of one row that holds prompts and answers without padding; kernels only (see packed.py).

    q (1, Hq, P, D), k and v (1, Hk, P, D) -> (1, Hq, P, D). sizes: tokens of each prompt and answer, in order; shared:
    for each answer which of them is its prompt, -1 for prompts. Answers stand directly behind their prompt.
    """
    return _call(_packed, *(x[0].transpose(0, 1) for x in (q, k, v)), True, sizes, shared).transpose(0, 1)[None]


def group_attention(q: Tensor, shared_k: Tensor, shared_v: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None,
                    keep: Tensor | None, starts: Tensor, most: int) -> Tensor:
    """One new token of each answer over its prompt's keys, stored once, and its own; kernels only (see generate.py).

    q (A, Hq, D); shared k, v (B, Hk, T, D), keep (B, T) bool without their padding; own k, v (A, Hk, S, D) of which
    lengths (A,) count, None = all. starts (B + 1,): rows starts[b]:starts[b + 1] belong to prompt b, `most` at most.
    """
    return _call(_cascade, q, shared_k, shared_v, k, v, lengths, keep, starts, most)


def rotary_tables(angles: Tensor, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """angles (..., D/2) fp32 -> cos, sin (..., D) for `rotate`: both doubled, the first half of sin with a minus."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, "rotate half" form: the pair (x_i, x_{i + D/2}) turns by the angle of i (arXiv 2104.09864).

    x (..., D); cos, sin from `rotary_tables`, broadcastable to x. Computed in the wider of the dtypes, returned in x's.
    With the sign inside the table this is one product, one swap of halves and one fused multiply-add.
    """
    if kernels := small_kernels(x):
        half = x.shape[-1] // 2
        cos, sin = (t.expand(*x.shape[:-2], 1, -1).flatten(0, -2) for t in (cos[..., :half], sin[..., half:]))
        return kernels.rotary(x.flatten(0, -3), cos, sin).view(x.shape)
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    if kernels := small_kernels(gate):
        return kernels.swiglu(gate, up)
    return F.silu(gate) * up
