"""Learned position tables at sizes that they were not trained for."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def resample_positions(
    table: Tensor, grid: tuple[int, int], num_prefix: int = 1, antialias: bool = False, offset: float = 0.0
) -> Tensor:
    """Resample a square table of positions bicubically, in float32.

    DINOv2's two published ways differ by up to 82 %: with an offset (0.1, no antialiasing), sample positions step by
    M / (h + offset) instead of M / h; without one (registers models), the table is resampled to the exact size.

    Args:
        table: [1, num_prefix + M², C].
        grid: Rows and columns wanted, (h, w).
        num_prefix: Rows of class tokens in front, which are kept as they are.
        antialias: Low-pass filter where the grid is coarser than the table.
        offset: DINOv2's `interpolate_offset`; 0 means exact size.

    Returns:
        [1, num_prefix + h · w, C] in the table's type.
    """
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    side = math.isqrt(patches.shape[1])
    if grid == (side, side):
        return table
    maps = patches.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if offset:
        scale = [(length + offset) / side for length in grid]
        maps = F.interpolate(maps, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        maps = F.interpolate(maps, size=grid, mode="bicubic", antialias=antialias)
    if tuple(maps.shape[-2:]) != grid:
        raise ValueError(f"a table of {side}x{side} positions cannot be resampled to {grid} with offset {offset}")
    return torch.cat([prefix, maps.flatten(2).mT.to(table.dtype)], dim=1)
