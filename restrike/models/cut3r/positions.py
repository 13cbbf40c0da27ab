"""Rotary tables of a rollout: made once, used by every block of every view."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from restrike.models.layers.rotary import RotaryTable, grid_positions

StatePositions = Literal["2d", "1d"]
_POSE_TOKEN_AT = -1  # row and column


class DecoderTables(NamedTuple):
    """Tables of the two sequences for the heads of one decoder: pose token and patches, and state tokens."""

    view: RotaryTable
    state: RotaryTable


def state_positions(size: int, kind: StatePositions, device: torch.device | None = None) -> Tensor:
    """(row, column) of state tokens, [size, 2]: row-major in a grid of even width ("2d"), or (i, i)."""
    index = torch.arange(size, device=device)
    if kind == "1d":
        return torch.stack([index, index], dim=-1)
    width = math.isqrt(size)
    width += width % 2
    return torch.stack([index // width, index % width], dim=-1)


def view_positions(grid: tuple[int, int], is_present: Tensor | None, device: torch.device) -> Tensor:
    """(row, column) of the patches of all frames.

    Args:
        grid: Rows and columns.
        is_present: [B, V] bool, False where a view has neither image nor ray map: all its patches lie at (0, 0), as
            published. None: all are present.

    Returns:
        [N, 2], or [B, V, 1, N, 2] where some view is absent.
    """
    positions = grid_positions(*grid, device=device)
    if is_present is None:
        return positions
    return positions * is_present[:, :, None, None, None]


def with_pose_token(positions: Tensor) -> Tensor:
    """Positions [..., N, 2] with the pose token's in front, [..., 1 + N, 2]."""
    token = positions.new_full((*positions.shape[:-2], 1, 2), _POSE_TOKEN_AT)
    return torch.cat([token, positions], dim=-2)


def frames(tables: RotaryTable) -> RotaryTable:
    """The table of all views, [B, V, 1, N, d], for frames in one row, [B V, 1, N, d]; one shared by all stays."""
    return tables if tables.cos.ndim == 2 else RotaryTable(*(part.flatten(0, 1) for part in tables))


def of_view(tables: RotaryTable, view: int) -> RotaryTable:
    """The table of one view, [B, 1, N, d]."""
    return tables if tables.cos.ndim == 2 else RotaryTable(*(part[:, view] for part in tables))


def of_frames(tables: RotaryTable, start: int, stop: int) -> RotaryTable:
    """The table of some of the frames that `frames` has put in one row."""
    return tables if tables.cos.ndim == 2 else RotaryTable(*(part[start:stop] for part in tables))
