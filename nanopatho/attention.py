"""The one attention function every model of this repository calls, its one mask builder, and rotary rotation.

Contract: q (B, Hq, Tq, D), k and v (B, Hk, Tk, D) -> (B, Hq, Tq, D), scale D^-0.5, softmax over the keys. Hq is a
multiple of Hk; query head h reads key head h // (Hq / Hk) (grouped-query attention, arXiv 2305.13245). Everything here
is a pure function of tensors, imports torch only and may be copied alone.

Letters: B batch, T tokens, H heads (Hq query, Hk key/value heads), D head width, P packed tokens, S segments, L
segment length.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def segments(lengths: list[int], device=None) -> Segments:
    """Plan for `segment_attention`: equally long segments become one batched call, others one for each length."""
    if len(set(lengths)) == 1:
        return Segments(lengths[0], (), None)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    groups = tuple(starts[sizes == L, None] + torch.arange(L) for L in sorted(set(lengths)))  # each (S, L)
    inverse = torch.cat([g.flatten() for g in groups]).argsort()
    return Segments(None, tuple(g.to(device) for g in groups), inverse.to(device))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, plan: Segments) -> Tensor:
    """Bidirectional attention inside each segment. q, k, v (P, H, D) -> (P, H, D)."""
    P, H, D = q.shape
    if plan.length:
        q, k, v = (x.view(P // plan.length, plan.length, H, D).transpose(1, 2) for x in (q, k, v))  # (S, H, L, D)
        return attention(q, k, v).transpose(1, 2).reshape(P, H, D)
    parts = [attention(*(x[index].transpose(1, 2) for x in (q, k, v))) for index in plan.groups]  # each (S, H, L, D)
    return torch.cat([part.transpose(1, 2).reshape(-1, H, D) for part in parts])[plan.inverse]


def rotary_tables(angles: Tensor, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """angles (..., D/2) fp32 -> cos, sin (..., D) for `rotate`: both doubled, the first half of sin with a minus."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, "rotate half" form: the pair (x_i, x_{i + D/2}) turns by the angle of i (arXiv 2104.09864).

    x (..., D); cos, sin from `rotary_tables`, broadcastable to x. Computed in the wider of the dtypes, returned in x's.
    With the sign inside the table this is one product, one swap of halves and one fused multiply-add.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin).to(x.dtype)
