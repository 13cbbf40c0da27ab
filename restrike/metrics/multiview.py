"""Cameras, depth and points of one prediction, by VGGT's protocols (arXiv 2503.11651, section 4), as one object.

Poses: all pairs, pooled by category, then the mean of categories. Depth: each scene scaled by the ratio of medians.
Points: lifted from predicted depth and cameras, brought onto the truth by one similarity (Umeyama) per scene.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from restrike.geometry import (
    camera_centers,
    compose_se3,
    invert_se3,
    make_se3,
    nearest_neighbors,
    nearest_rotation,
    rotate,
    umeyama,
    unproject_depth,
)
from restrike.metrics.camera_pose import PoseAccuracy, RelativePose, camera_scene_scale
from restrike.metrics.depth import DepthErrors

_DEPTH_NAMES = ("abs_rel", "rmse", "delta@1.25", "delta@1.25^2", "delta@1.25^3")
_MIN_POINTS = 3


class PointErrors(Metric):
    """Accuracy (predicted to true), completeness (true to predicted), and their mean "overall", per scene, averaged.

    In units of the true points given. Corresponding points fix the similarity; distances are to the nearest point.

    Args:
        max_points: Of each cloud; more are thinned evenly, in row-major order.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    scenes: Tensor

    def __init__(self, max_points: int = 4096) -> None:
        super().__init__()
        self.max_points = max_points
        self.add_state("total", torch.zeros(2, dtype=torch.float64), "sum")
        self.add_state("scenes", torch.zeros((), dtype=torch.float64), "sum")

    def update(self, predicted: Tensor, true: Tensor, mask: Tensor) -> None:
        """Add scenes: points [B, ..., 3] twice, mask [B, ...]; a scene with fewer than 3 points is passed over."""
        for points, target, keep in zip(predicted.double(), true.double(), mask, strict=True):
            if int(keep.sum()) < _MIN_POINTS:
                continue
            points, target = points[keep], target[keep]
            points = umeyama(points, target).apply(points)
            step = math.ceil(len(target) / self.max_points)
            points, target = points[::step], target[::step]
            there = nearest_neighbors(points, target).distances.mean()
            back = nearest_neighbors(target, points).distances.mean()
            self.total += torch.stack([there, back])
            self.scenes += 1

    def compute(self) -> dict[str, Tensor]:
        """Name -> mean over scenes; NaN before the first."""
        accuracy, completeness = self.total / self.scenes
        overall = (accuracy + completeness) / 2
        return {"point_accuracy": accuracy, "point_completeness": completeness, "point_overall": overall}


class MultiViewMetrics(nn.Module):
    """Everything that is reported of one set of weights.

    Names: "rra@τ", "rta@τ", "auc@τ" (as released) and "auc@30_invariant" (see `PoseAccuracy.relative`), "abs_rel",
    "rmse", "delta@1.25" and its powers, "point_accuracy", "point_completeness", "point_overall", and means of the
    losses.

    Args:
        categories: Groups of the pose accuracy.
        losses: Names of losses, averaged over scenes.
        relative: Relative poses of the released script or the invariant ones.
        points: Also compare clouds, which costs more than all the rest.
        max_points: See `PointErrors`.
    """

    def __init__(
        self,
        categories: Sequence[str],
        losses: Sequence[str] = (),
        relative: RelativePose = "released",
        points: bool = False,
        max_points: int = 4096,
    ) -> None:
        super().__init__()
        self.pose = PoseAccuracy(maa=(), groups=categories, relative=relative)
        self.invariant = PoseAccuracy(rra=(), rta=(), maa=(), auc=(30,), groups=categories, relative="camera")
        self.depth = DepthErrors("median")
        self.points = PointErrors(max_points) if points else None
        self.loss_names = tuple(losses)
        self.losses = nn.ModuleList(MeanMetric() for _ in losses)

    def update(
        self,
        world_to_camera: tuple[Tensor, Tensor],
        depth: tuple[Tensor, Tensor],
        intrinsics: tuple[Tensor, Tensor],
        categories: Sequence[str],
        losses: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add scenes; each pair is (predicted, true).

        Args:
            world_to_camera: [B, V, 3, 4].
            depth: [B, V, H, W], true ≤ 0 where unknown.
            intrinsics: [B, V, 3, 3], pixels, corner origin.
            categories: Group of each scene.
            losses: Of this batch; those that were announced count.
        """
        for metric in (self.pose, self.invariant):
            metric.update(*world_to_camera, categories)
        self.depth.update(*depth)
        if self.points is not None:
            predicted, true = (
                unproject_depth(d, k, invert_se3(e)) for d, k, e in zip(depth, intrinsics, world_to_camera, strict=True)
            )
            self.points.update(predicted, true, depth[1] > 0)
        for name, mean in self._losses():
            if losses and name in losses:
                mean.update(losses[name], weight=len(categories))

    def compute(self) -> dict[str, Tensor]:
        """Name -> value, the same on all ranks; every rank has to take part."""
        values = self.pose.compute()
        values["auc@30_invariant"] = self.invariant.compute()["auc@30"]
        depth = self.depth.compute()
        values |= {name: depth[name] for name in _DEPTH_NAMES}
        if self.points is not None:
            values |= self.points.compute()
        return values | {name: mean.compute() for name, mean in self._losses()}

    def _losses(self) -> list[tuple[str, MeanMetric]]:
        return list(zip(self.loss_names, cast(list[MeanMetric], list(self.losses)), strict=True))

    def reset(self) -> None:
        """Forget all scenes."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()


def trivial_cameras(world_to_camera: Tensor) -> Tensor:
    """Identity poses, [..., V, 3, 4]: what a predictor says that looks at no image."""
    identity = torch.eye(3, 4, dtype=world_to_camera.dtype, device=world_to_camera.device)
    return identity.expand_as(world_to_camera).clone()


def mean_cameras(world_to_camera: Tensor) -> Tensor:
    """The mean motion of scenes: what a predictor says that knows how cameras move and looks at no image.

    Args:
        world_to_camera: [S, V, 3, 4], each scene in a world and unit of its own.

    Returns:
        [V, 3, 4] in the first camera's world: of every view the rotation nearest to the mean one, and the mean centre
        in units of `camera_scene_scale`.
    """
    moved = compose_se3(world_to_camera, invert_se3(world_to_camera[:, :1]))
    centers = camera_centers(moved) / camera_scene_scale(moved)[:, None, None]
    rotation = nearest_rotation(moved[..., :3].mean(0))
    return make_se3(rotation, -rotate(rotation, centers.mean(0)))
