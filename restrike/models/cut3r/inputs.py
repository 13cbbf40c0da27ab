"""What CUT3R is shown of each view in training: its image, its ray map, or both (arXiv 2501.12387, section 3.4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from restrike.geometry import cut3r_ray_map

MASK_PROBABILITIES = (0.8, 0.15, 0.05)  # image only, ray map only, both


class Inputs(NamedTuple):
    """Ray maps [B, V, H, W, 6] and masks [B, V] bool, as `CUT3R.forward` takes them; None: images only."""

    ray_maps: Tensor | None = None
    image_mask: Tensor | None = None
    ray_mask: Tensor | None = None


def draw_inputs(
    camera_to_world: Tensor,
    intrinsics: Tensor,
    image_size: tuple[int, int],
    seed: int,
    probabilities: tuple[float, float, float] = MASK_PROBABILITIES,
    released_ray_map: bool = True,
    first_scene: int = 0,
) -> Inputs:
    """Inputs of scenes in metres; a ray map means nothing where the unit of length is unknown.

    Args:
        camera_to_world: [B, V, 3, 4].
        intrinsics: [B, V, 3, 3], pixels, corner origin.
        image_size: (H, W).
        seed: All draws are a function of it.
        probabilities: Of image only, ray map only, and both, for every view but the first, which has its image only.
        released_ray_map: See `add_translation` of `restrike.geometry.cut3r_ray_map`.
        first_scene: Where these scenes begin in their batch, of which all scenes have draws of their own.
    """
    batch, views = intrinsics.shape[:2]
    draws = torch.rand(first_scene + batch, views, generator=torch.Generator().manual_seed(seed))[first_scene:]
    draws = draws.to(intrinsics.device)
    image_only, ray_only, _ = probabilities
    ray_mask = draws >= image_only
    image_mask = (draws < image_only) | (draws >= image_only + ray_only)
    ray_mask[:, 0], image_mask[:, 0] = False, True
    first = camera_to_world[:, :1].expand_as(camera_to_world)
    maps = cut3r_ray_map(intrinsics, camera_to_world, first, image_size, add_translation=released_ray_map)
    return Inputs(maps, image_mask, ray_mask)
