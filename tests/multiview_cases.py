"""Inputs that several recorded multi-view cases are built from, and random scenes for property tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parity_tools import normal
from restrike import geometry as g


class Scene(NamedTuple):
    """Cameras around a cloud of depths, all [B, V, …] in float64 unless asked otherwise."""

    world_to_camera: Tensor
    intrinsics: Tensor
    depth: Tensor

    @property
    def points_world(self) -> Tensor:
        return g.unproject_depth(self.depth, self.intrinsics, g.invert_se3(self.world_to_camera))


def random_rotations(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform over all rotations, [*shape, 3, 3]."""
    return g.quaternion_to_matrix(torch.randn(*shape, 4, generator=generator, dtype=dtype), "wxyz")


def random_scene(
    seed: int, views: int = 3, batch: int = 2, size: tuple[int, int] = (4, 6), dtype: torch.dtype = torch.float64
) -> Scene:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, views, *shape, generator=generator, dtype=dtype)

    cameras = g.make_se3(random_rotations(generator, batch, views, dtype=dtype), draw(3))
    center = torch.tensor([size[1] / 2, size[0] / 2], dtype=dtype)
    intrinsics = g.make_intrinsics(5 + draw(2).tanh(), center + 0.5 * draw(2))
    return Scene(cameras, intrinsics, 3 + draw(*size).tanh())


def random_similarity(seed: int, *shape: int) -> g.Similarity:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(*shape, generator=generator, dtype=torch.float64).exp()
    shift = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    return g.Similarity(scale, random_rotations(generator, *shape), shift)


def move_world(world_to_camera: Tensor, move: g.Similarity) -> Tensor:
    """Cameras [B, V, 3, 4] of a world that a similarity [B] moved, with unit scale in each camera's rotation."""
    return g.invert_se3(move.apply_to_cameras(g.invert_se3(world_to_camera)))


def cut3r_poses(tag: str, batch: int, angle: float = 0.4, shift: float = 0.5) -> Tensor:
    rotation = g.axis_angle_to_matrix(angle * normal(f"{tag}/aa", batch, 3))
    return g.make_se3(rotation, shift * normal(f"{tag}/t", batch, 3))


def cut3r_views(meta: dict[str, Any]) -> dict[str, Tensor]:
    """Views of a loss case in the frame of the first view, [B, V, H, W, …]."""
    tag, v, b, h, w = (meta[key] for key in ("tag", "V", "B", "H", "W"))
    offset, guess = torch.tensor([0, 0, 3.0]), torch.tensor([0, 0, 2.5])

    def stack(views: list[Tensor]) -> Tensor:
        return torch.stack(views, dim=1)

    poses = stack([cut3r_poses(f"{tag}/gt{i}", b) for i in range(v)])
    world = stack([normal(f"{tag}/gt{i}/pts", b, h, w, 3) for i in range(v)]) + offset
    noise = stack([normal(f"{tag}/gt{i}/m", b, h, w) for i in range(v)])
    return {
        "self": g.transform_points(g.invert_se3(poses), world),
        "cross": g.transform_points(g.invert_se3(poses[:, 0]), world),
        "valid": noise > -0.8,
        "sky": noise < -1.6,
        "pred_self": 0.8 * stack([normal(f"{tag}/pr{i}/self", b, h, w, 3) for i in range(v)]) + guess,
        "pred_cross": 0.8 * stack([normal(f"{tag}/pr{i}/other", b, h, w, 3) for i in range(v)]) + guess,
        "conf_self": 1 + torch.exp(stack([normal(f"{tag}/pr{i}/cs", b, h, w) for i in range(v)])),
        "conf_cross": 1 + torch.exp(stack([normal(f"{tag}/pr{i}/c", b, h, w) for i in range(v)])),
    }
