"""What the tracker looks at: samples of feature maps, correlations around a point, sinusoids of places and motions."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_SCALE = 518.0  # pixels that a motion is divided by


def sample_maps(maps: Tensor, coords: Tensor, padding: Literal["border", "zeros"] = "border") -> Tensor:
    """Bilinear samples.

    Args:
        maps: [B, C, H, W].
        coords: [B, *any, 2], (x, y) in pixels of the map; the first pixel's centre is (0, 0).
        padding: Beyond the map: its border, or zeros.

    Returns:
        [B, *any, C].
    """
    height, width = maps.shape[-2:]
    span = coords.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    dtype = torch.promote_types(maps.dtype, coords.dtype)  # places must not be rounded to half precision
    grid = (2 * coords / span - 1).flatten(1, -2)[:, None].to(dtype)
    samples = F.grid_sample(maps.to(dtype), grid, mode="bilinear", padding_mode=padding, align_corners=True)
    return samples[:, :, 0].mT.unflatten(1, coords.shape[1:-1])


def feature_pyramid(maps: Tensor, levels: int) -> list[Tensor]:
    """Maps [B, V, C, H, W] and their means over 2x2, 4x4, … pixels.

    Raises:
        ValueError: the coarsest level would be empty.
    """
    if min(maps.shape[-2:]) >> (levels - 1) < 1:
        raise ValueError(
            f"{levels} correlation levels need feature maps of at least {1 << (levels - 1)} pixels a side, got "
            f"{maps.shape[-2]}x{maps.shape[-1]} (half the image); use larger images"
        )
    pyramid = [maps]
    for _ in range(levels - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1].flatten(0, 1), 2).unflatten(0, maps.shape[:2]))
    return pyramid


def correlate(pyramid: list[Tensor], features: Tensor, coords: Tensor, radius: int) -> Tensor:
    """Similarity of each track's features to the maps around its place.

    Args:
        pyramid: Maps [B, V, C, H, W] from `feature_pyramid`.
        features: [B, V, N, C].
        coords: [B, V, N, 2], (x, y) in pixels of the finest map.
        radius: Of the window in pixels of each level.

    Returns:
        [B, V, N, levels · (2 radius + 1)²]. As released, a window's rows shift x and its columns y.
    """
    steps = torch.arange(-radius, radius + 1, device=coords.device, dtype=coords.dtype)
    window = torch.cartesian_prod(steps, steps)
    num_tracks = coords.shape[2]
    found = []
    for level, maps in enumerate(pyramid):
        volume = torch.einsum("bvnc,bvchw->bvnhw", features, maps) / math.sqrt(maps.shape[2])
        places = coords[..., None, :] / 2**level + window
        samples = sample_maps(volume.flatten(0, 2)[:, None], places.flatten(0, 2), padding="zeros")
        found.append(samples[..., 0].unflatten(0, (*coords.shape[:2], num_tracks)))
    return torch.cat(found, dim=-1)


def embed_motion(motion: Tensor, width: int) -> Tensor:
    """Sines (even channels) and cosines (odd) of each component, x then y: [..., 2] -> [..., 2 · width].

    Frequencies reach 1000 radians a pixel, which multiplies rounding errors: two correct implementations agree for
    one round of the tracker only.
    """
    frequency = torch.arange(0, width, 2, device=motion.device, dtype=torch.float32) * (1000.0 / width)
    angles = motion[..., None] * frequency
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def position_table(channels: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """Sinusoids of the columns (first half of the channels) and rows of a map, base 10000: [1, channels, h, w]."""
    height, width = size
    quarter = channels // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=device) / quarter)

    def axis(count: int) -> Tensor:
        angles = omega[:, None] * torch.arange(count, dtype=torch.float64, device=device)
        return torch.cat([angles.sin(), angles.cos()]).float()

    columns = axis(width)[:, None, :].expand(2 * quarter, *size)
    rows = axis(height)[:, :, None].expand(2 * quarter, *size)
    return torch.cat([columns, rows])[None]
