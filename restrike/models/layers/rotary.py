"""Rotary embedding of 2-D positions (CroCo v2, arXiv 2211.10408; RoPE, arXiv 2104.09864).

The first half of a head's channels turns with y, the second with x. Inside a half of 2Q channels, channel k is paired
with k + Q, not with its neighbour. Angles are computed, not looked up, so positions may be negative (CUT3R's pose
token), and one table serves queries and keys of every block of a forward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTable(NamedTuple):
    """Each [..., N, head_dim] in float32, to be broadcast against [B, num_heads, N, head_dim].

    A rotation takes the partner's sine with a minus for the first of each pair; the table has the sign already.
    """

    cos: Tensor
    signed_sin: Tensor

    def repeat(self, times: int) -> RotaryTable:
        """The table of `times` sequences put one after another."""
        return RotaryTable(*(part.repeat(*(1,) * (part.ndim - 2), times, 1) for part in self))


def grid_positions(height: int, width: int, offset: int = 0, device: torch.device | None = None) -> Tensor:
    """(y, x) of a grid's patches, row-major, [height · width, 2]; the first one is (offset, offset)."""
    y = torch.arange(height, device=device) + offset
    x = torch.arange(width, device=device) + offset
    return torch.cartesian_prod(y, x)


def rotary_table(positions: Tensor, head_dim: int, base: float = 100.0) -> RotaryTable:
    """Table of positions.

    Args:
        positions: [..., N, 2], (y, x).
        head_dim: Channels per head, a multiple of 4.
        base: Frequencies are base^(-k / Q) with Q = head_dim / 4, k < Q.

    Raises:
        ValueError: `head_dim` is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary embedding needs a multiple of 4 channels per head, got {head_dim}")
    quarter = head_dim // 4
    exponent = torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter
    angles = positions[..., None].float() * base**-exponent  # [..., N, 2, Q]
    cos, sin = angles.cos(), angles.sin()
    return RotaryTable(torch.cat([cos, cos], dim=-1).flatten(-2), torch.cat([-sin, sin], dim=-1).flatten(-2))


def rotate_channels(x: Tensor, table: RotaryTable) -> Tensor:
    """Turn queries or keys [B, num_heads, N, head_dim]; the result is float32 at least."""
    y_first, y_second, x_first, x_second = x.chunk(4, dim=-1)
    partners = torch.cat([y_second, y_first, x_second, x_first], dim=-1)
    return torch.addcmul(x * table.cos, partners, table.signed_sin)
