"""Fixed sinusoids of views, tokens and diffusion times, and the small network that reads the last.

Unusual: tables interleave sine and cosine and are computed in float64; times put all cosines first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from restrike.models.layers.linear import Linear

IMAGE_BASE = 10000.0
TOKEN_BASE = 70007.0
TIME_FEATURES = 256


def sinusoid_table(rows: int, dim: int, base: float) -> Tensor:
    """[1, rows, dim] float32: sin(p / base^(2⌊j/2⌋/dim)) in even columns j, the cosine in odd ones."""
    column = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] / base ** (2 * (column // 2) / dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()[None]


class PositionTables(nn.Module):
    """Which view and which patch a token is of. A view's number is its place in this call.

    Args:
        max_views: Rows of the view table.
        num_patches: Rows of the patch table.
        dim: Width.
    """

    derived_buffers = frozenset({"image_pos_table", "token_pos_table"})
    image_pos_table: Tensor
    token_pos_table: Tensor

    def __init__(self, max_views: int, num_patches: int, dim: int) -> None:
        super().__init__()
        self.max_views = max_views
        self.register_buffer("image_pos_table", sinusoid_table(max_views, dim, IMAGE_BASE))
        self.register_buffer("token_pos_table", sinusoid_table(num_patches, dim, TOKEN_BASE))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, V, N, dim] -> the same, positions added.

        Raises:
            ValueError: more views than the table has rows.
        """
        views = tokens.shape[1]
        if views > self.max_views:
            raise ValueError(
                f"{views} views in one call, but the model has positions for {self.max_views}: build it with a larger "
                "max_num_images, or let `sample_rays` split them"
            )
        return tokens + self.image_pos_table[:, :views, None] + self.token_pos_table[:, None]


def timestep_features(timesteps: Tensor, dim: int = TIME_FEATURES) -> Tensor:
    """[T] integers -> [T, dim] float32: cos(t f), then sin(t f), f_k = 10000^(-k / (dim/2))."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Diffusion times [T] -> [T, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_FEATURES, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(timestep_features(timesteps).to(next(self.parameters()).dtype))
