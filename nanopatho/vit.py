"""Qwen2.5-VL's vision tower: patches at native resolution, windowed and full attention, 2-D rotary positions, merger.

Source: arXiv 2502.13923 section 2.1.1 and the published weights, whose parameter names the module tree reproduces
(`visual.blocks.0.attn.qkv.weight`, ...). Needs attention.py and projector.py beside it. Pictures that come as bytes need
image.py too.

How images travel: the patches of all images of a batch lie one after the other in one long list of P rows, no padding.
Patches come in "cells" of merge x merge neighbours (image.py writes them so), because a cell later becomes one language
token. Most blocks attend only inside windows of window_size pixels: linear cost in the image area. The few
`fullatt_block_indexes` blocks see the whole image. So that a window is contiguous, cells are reordered once before the
first block and put back at the end.

Letters: P patches, C cells (P = C * merge^2), D width, H heads, K head width.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Segments, rotary_tables, segments, swiglu, vision_attention
from .projector import PatchMerger, RMSNorm

THETA = 10000.0  # rotary base of the tower; fixed in the published code


def window_order(rows: int, cols: int, side: int) -> tuple[Tensor, list[int]]:
    """Cells of a rows x cols image listed window by window, and how many cells each window holds.

    Windows are side x side, row-major, cut off at the right and lower border, cells row-major inside.
    window_order(2, 3, 2) -> tensor([0, 1, 3, 4, 2, 5]), [4, 2]
    """
    grid = torch.arange(rows * cols).view(rows, cols)
    windows = [w.flatten() for band in grid.split(side) for w in band.split(side, dim=1)]
    return torch.cat(windows), [len(w) for w in windows]


@lru_cache(maxsize=256)
def image_tables(rows: int, cols: int, merge: int, side: int, head_width: int) -> tuple[Tensor, Tensor, list[int]]:
    """Image of rows x cols patches -> angles (P, K/2) in window order, cell order (C,), window sizes in cells."""
    order, sizes = window_order(rows // merge, cols // merge, side)
    where = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))  # (P, 2) row and column of every patch
    where = where.view(rows // merge, merge, cols // merge, merge, 2).transpose(1, 2).reshape(-1, merge * merge, 2)
    frequency = THETA ** -(torch.arange(0, head_width // 2, 2) / (head_width // 2))  # (K/4,) for each axis
    angles = where[order].view(-1, 2, 1) * frequency  # (P, 2, K/4): row angles, column angles
    return angles.flatten(1), order, sizes


class Tables(NamedTuple):
    cos: Tensor  # (P, 1, K) fp32
    sin: Tensor
    order: Tensor  # (C,) long: position in window order -> cell
    inverse: Tensor  # (C,) long: the way back
    windows: Segments
    images: Segments


@lru_cache(maxsize=16)
def batch_tables(grids: tuple[tuple[int, int, int], ...], merge: int, side: int, head_width: int, device) -> Tables:
    """Tables of a whole batch. Cached: for tiny models on a CPU building them costs more than what they serve."""
    angles, orders, windows, images, first = [], [], [], [], 0
    for t, rows, cols in grids:
        if t != 1 or rows % merge or cols % merge or rows * cols == 0:
            raise ValueError(f"image_grid_thw row ({t}, {rows}, {cols}): expected (1, h, w), h and w positive "
                             f"multiples of {merge}; videos are not supported")
        angle, order, sizes = image_tables(rows, cols, merge, side, head_width)
        angles.append(angle)
        orders.append(order + first)
        windows += [n * merge * merge for n in sizes]
        images.append(rows * cols)
        first += len(order)
    angles, order = torch.cat(angles)[:, None].to(device), torch.cat(orders).to(device)  # (P, 1, K/2), (C,)
    return Tables(*rotary_tables(angles), order, order.argsort(), segments(windows, device), segments(images, device))


class PatchEmbed(nn.Module):
    """(P, 3 * 2 * 14 * 14) flattened patches -> (P, D). A Conv3d whose stride is its kernel is a Linear."""

    def __init__(self, v: dict):
        super().__init__()
        kernel = (v["temporal_patch_size"], v["patch_size"], v["patch_size"])
        self.proj = nn.Conv3d(v["in_chans"], v["hidden_size"], kernel, stride=kernel, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.linear(pixels, self.proj.weight.flatten(1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, plan: Segments) -> Tensor:
        qkv = self.qkv(x).view(len(x), 3, self.heads, -1)  # (P, 3, H, K)
        return self.proj(vision_attention(qkv, cos, sin, plan).flatten(1))  # (P, H, K) -> (P, D)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202), with biases in the vision tower."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden)
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, v: dict):
        super().__init__()
        self.norm1 = RMSNorm(v["hidden_size"])
        self.norm2 = RMSNorm(v["hidden_size"])
        self.attn = Attention(v["hidden_size"], v["num_heads"])
        self.mlp = MLP(v["hidden_size"], v["intermediate_size"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, plan: Segments) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, plan)
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """v: the vision_config dict, every field present (see vlm.parse_config)."""

    def __init__(self, v: dict):
        super().__init__()
        self.merge = v["spatial_merge_size"]
        self.side = v["window_size"] // self.merge // v["patch_size"]  # cells along a window
        self.head_width = v["hidden_size"] // v["num_heads"]
        self.full = frozenset(v["fullatt_block_indexes"])
        self.recompute = False  # True: keep only block inputs for backward and compute the rest twice, to save memory
        self.patch_embed = PatchEmbed(v)
        self.blocks = nn.ModuleList(Block(v) for _ in range(v["depth"]))
        self.merger = PatchMerger(v["hidden_size"], v["out_hidden_size"], self.merge)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """pixel_values (P, 1176) or the bytes they come from, (P, 588) uint8, image_grid_thw (images, 3), both as
        image.qwen_pixels gives them -> (C, out_hidden_size).

        Rows come in prompt order: image after image, cells row by row.
        """
        grids = tuple(map(tuple, image_grid_thw.tolist()))
        tables = batch_tables(grids, self.merge, self.side, self.head_width, pixel_values.device)
        if len(pixel_values) != len(tables.cos):
            raise ValueError(f"pixel_values has {len(pixel_values)} patches, image_grid_thw {list(grids)} asks for "
                             f"{len(tables.cos)}")
        if pixel_values.dtype == torch.uint8:
            from .image import patch_values
            pixel_values = patch_values(pixel_values)
        x = self.patch_embed(pixel_values.to(self.patch_embed.proj.weight.dtype))  # (P, D)
        x = x.view(len(tables.order), -1).index_select(0, tables.order).view_as(x)  # window order
        for i, block in enumerate(self.blocks):
            plan = tables.images if i in self.full else tables.windows
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, tables.cos, tables.sin, plan, use_reentrant=False)
            else:
                x = block(x, tables.cos, tables.sin, plan)
        return self.merger(x).index_select(0, tables.inverse)  # (C, H_lm), prompt order again
