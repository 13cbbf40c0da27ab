"""A DiffusionSfM with every part of the big one, in milliseconds, and scenes for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parity_tools import fill_, image
from restrike import geometry as g
from restrike.data.samples import MultiViewBatch
from restrike.models import build

SIZES: dict[str, Any] = {
    "depth": 4,
    "width": 4,
    "hidden_size": 32,
    "num_heads": 2,
    "img_size": 56,
    "encoder_dim": 24,
    "encoder_depth": 2,
    "encoder_num_heads": 2,
    "encoder_taps": (0, 1),
    "embed_dim": 16,
    "decoder_features": 8,
}


def tiny_diffusionsfm(name: str = "diffusionsfm_sparse", **overrides: Any) -> nn.Module:
    """In eval mode, weights by name, so that the blocks' gates are open."""
    return fill_(build(name, **{**SIZES, **overrides})).eval()


def toy_coords(batch: int, views: int, patches: int = 4) -> Tensor:
    """NDC coordinates of crops that differ from view to view."""
    left = torch.arange(batch * views).view(batch, views, 1) * 5.0
    boxes = torch.cat([left, left / 2, left + 240, left / 2 + 240], dim=-1)
    parameters = g.crop_parameters(boxes, torch.tensor([480, 640]).expand(batch, views, 2))
    return g.patch_centers(parameters, patches).movedim(-1, -3).float()


def toy_views(batch: int = 2, views: int = 3, depth_size: int = 4, seed: int = 0, img_size: int = 56) -> MultiViewBatch:
    """Cameras that look at a bumpy wall from nearby, off-centre square crops of 480 x 640 pictures."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, views, *shape, generator=generator)

    cameras = g.make_se3(g.axis_angle_to_matrix(0.3 * draw(3)), 0.5 * draw(3))
    boxes = torch.tensor([40.0, 20.0, 460.0, 440.0]) + 20 * draw(1).tanh()
    zoom = img_size / 420
    center = torch.tensor([320.0, 240.0]) - boxes[..., :2]
    intrinsics = g.make_intrinsics((600 + 30 * draw(2).tanh()) * zoom, center * zoom)
    depth = 3 + draw(depth_size, depth_size).tanh()
    return MultiViewBatch(
        images=image(f"toy{seed}", batch, views, 3, img_size, img_size) * 4 - 2,
        depth=depth,
        valid_depth=draw(depth_size, depth_size) > -1,
        foreground=draw(depth_size, depth_size) > 0,
        intrinsics=intrinsics,
        world_to_camera=cameras,
        crop_boxes=boxes,
        source_sizes=torch.tensor([480, 640]).expand(batch, views, 2),
        frame_numbers=torch.arange(views).expand(batch, views),
        is_video=torch.zeros(batch, views, dtype=torch.bool),
        valid=torch.ones(batch, dtype=torch.bool),
        keys=[f"apple/{row}" for row in range(batch)],
        seed=seed,
    )
