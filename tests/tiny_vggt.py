"""A VGGT with every part of the big one, in milliseconds, as the recorded cases build it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from parity_tools import fill_, image, normal
from restrike import geometry as g
from restrike.losses import MultiViewTargets
from restrike.models import build

SIZES = {
    "img_size": 70,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 4,
    "patch_embed_depth": 2,
    "patch_embed_num_heads": 4,
    "taps": (0, 1, 2, 3),
    "camera_depth": 2,
    "camera_num_heads": 8,
    "dpt_features": 32,
    "dpt_out_channels": (24, 32, 48, 48),
    "track_features": 32,
    "track_levels": 3,
    "track_radius": 2,
    "track_hidden_dim": 64,
    "track_depth": 2,
}
CAMERA_DEPTH = {"enable_point": False, "enable_track": False}
_FACTORS = {"pos_embed": 20, "cls_token": 10, "register_tokens": 10, "camera_token": 10, "register_token": 10}


@torch.no_grad()
def scale_up_(module: nn.Module, gamma: float = 5.0) -> nn.Module:
    """What cases do after `fill_`, so that small parameters show in the outputs."""
    for name, parameter in module.named_parameters():
        parameter.mul_({**_FACTORS, "gamma": gamma}.get(name.rsplit(".", 1)[-1], 1.0))
    return module


def tiny_vggt(**overrides: Any) -> nn.Module:
    return scale_up_(fill_(build("vggt_1b", **{**SIZES, **overrides}))).eval()


def recorded_targets(seed: str, batch: int, views: int, height: int, width: int, *, is_scene: bool) -> MultiViewTargets:
    """Targets of a recorded case; with `is_scene` points follow from depth, and the batch is normalised."""
    shape = batch, views
    noise = normal(f"{seed}-dn", *shape, height, width)
    depth = torch.exp(0.4 * image(f"{seed}-d", *shape, 3, height, width)[:, :, 0] + 0.02 * noise)
    valid = normal(f"{seed}-m", *shape, height, width) > -0.5
    rotation = g.quaternion_to_matrix(normal(f"{seed}-q", *shape, 4), "xyzw")
    cameras = g.make_se3(rotation, normal(f"{seed}-t", *shape, 3))
    focal = torch.stack([width * (1 + 0.1 * normal(f"{seed}-f{axis}", *shape)) for axis in "xy"], dim=-1)
    intrinsics = g.make_intrinsics(focal, torch.tensor([width / 2, height / 2]))
    if not is_scene:
        points = torch.cat([0.5 * normal(f"{seed}-wp", *shape, height, width, 2), depth[..., None]], dim=-1)
        return MultiViewTargets(cameras, intrinsics, depth, points, valid)
    points = g.unproject_depth(depth, intrinsics, g.invert_se3(cameras), pixel_center=g.OPENCV_PIXEL_CENTER)
    scene = g.normalize_to_mean_distance(cameras, points, depth, valid)
    return MultiViewTargets(scene.world_to_camera, intrinsics, scene.depth, scene.points_world, valid)
