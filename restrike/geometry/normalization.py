"""Which world and which unit of length each family trains in. Scale is arbitrary in SfM data, so each divides it out.

VGGT          world = first camera; unit = mean distance of all valid points from it; predictions stay as they are.
DiffusionSfM  world = first camera; unit = its distance from the coordinate-wise median of its own points.
CUT3R         world = first camera; unit = confidence-weighted mean distance, taken apart for truth and prediction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from restrike.geometry.cameras import (
    camera_centers,
    compose_se3,
    invert_se3,
    make_se3,
    to_first_camera,
    transform_points,
)
from restrike.geometry.conventions import check_trailing, full_precision
from restrike.geometry.projection import unproject

_VGGT_COUNT_EPS = 1e-3
_VGGT_SCALE_RANGE = (1e-6, 1e6)
_DIFFUSIONSFM_MIN_DISTANCE = 1e-3
_CUT3R_MIN_WEIGHT = 1e-3
_CUT3R_EPS = 1e-8
CUT3R_MIN_SCALE = 1e-3  # factors at or below this also drop a sample from CUT3R's pose loss


@full_precision
def masked_median(values: Tensor, mask: Tensor) -> Tensor:
    """Lower median (torch's) over the last dimension where `mask`, batched; NaN where nothing is.

    Args:
        values: [..., N].
        mask: [..., N] bool, broadcast against `values`.

    Returns:
        [...].
    """
    values, mask = torch.broadcast_tensors(values, mask)
    ordered = torch.where(mask, values, torch.inf).sort(dim=-1).values
    count = mask.sum(-1, keepdim=True)
    median = ordered.gather(-1, ((count - 1) // 2).clamp(min=0))
    return torch.where(count > 0, median, torch.nan)[..., 0]


class NormalizedScene(NamedTuple):
    """VGGT's training targets; each as the argument of the same name. `scale` [B] is what lengths were divided by."""

    world_to_camera: Tensor
    points_world: Tensor
    depth: Tensor
    scale: Tensor


@full_precision
def normalize_to_mean_distance(
    world_to_camera: Tensor, points_world: Tensor, depth: Tensor, valid: Tensor, is_scaled: bool = True
) -> NormalizedScene:
    """VGGT's normalisation (arXiv 2503.11651, section 3.4): first camera as world, mean distance as unit.

    Points in the camera, which no loss needs, are `transform_points(result.world_to_camera, result.points_world)`, or
    the input's divided by `scale`.

    Args:
        world_to_camera: [B, V, 3, 4].
        points_world: [B, V, H, W, 3].
        depth: [B, V, H, W].
        valid: [B, V, H, W] bool.
        is_scaled: False only changes the world.

    Returns:
        NormalizedScene, NaN and infinities replaced by 0. A scene without a valid point gets the unit 1e-6, as
        published, so its lengths grow a million times: leave it out of every loss.
    """
    check_trailing("world_to_camera", world_to_camera, 3, 4)
    check_trailing("points_world", points_world, *depth.shape, 3)
    points = transform_points(world_to_camera[:, 0], points_world)
    cameras = to_first_camera(world_to_camera)
    scale = points.new_ones(points.shape[0])
    if is_scaled:
        distance = torch.where(valid, points.norm(dim=-1), 0.0)
        scale = distance.flatten(1).sum(-1) / (valid.flatten(1).sum(-1) + _VGGT_COUNT_EPS)
        scale = scale.clamp(*_VGGT_SCALE_RANGE)
    cameras = make_se3(cameras[..., :3], cameras[..., 3] / scale[:, None, None])
    points, depth = points / scale[:, None, None, None, None], depth / scale[:, None, None, None]
    return NormalizedScene(_finite(cameras), _finite(points), _finite(depth), scale)


class FirstViewScene(NamedTuple):
    """DiffusionSfM's scene; `scale` [...] is what lengths were multiplied by."""

    world_to_camera: Tensor
    depth: Tensor
    scale: Tensor


@full_precision
def normalize_to_first_view_median(
    world_to_camera: Tensor, depth: Tensor, intrinsics: Tensor, coords: Tensor
) -> FirstViewScene:
    """DiffusionSfM's normalisation (arXiv 2505.05473): first camera as world, distance to its median point as unit.

    Args:
        world_to_camera: [..., V, 3, 4], axes of `coords`.
        depth: [..., V, P, P], z-depth, holes filled.
        intrinsics: [..., V, 3, 3], in the unit of `coords`.
        coords: [..., V, P, P, 2].

    Returns:
        FirstViewScene; scale 1 where the median lies within 0.001 of the camera.
    """
    check_trailing("world_to_camera", world_to_camera, 3, 4)
    first = world_to_camera[..., 0, :, :]
    points = unproject(coords[..., 0, :, :, :], depth[..., 0, :, :], intrinsics[..., 0, :, :], invert_se3(first))
    # Lower median, in the world and not in the camera: it is taken per coordinate, so the axes matter.
    medoid = points.flatten(-3, -2).median(dim=-2).values
    distance = (medoid - camera_centers(first)).norm(dim=-1)
    scale = torch.where(distance < _DIFFUSIONSFM_MIN_DISTANCE, 1.0, 1 / distance)
    relative = to_first_camera(world_to_camera)
    cameras = make_se3(relative[..., :3], relative[..., 3] * scale[..., None, None])
    return FirstViewScene(cameras, depth * scale[..., None, None, None], scale)


@full_precision
def confidence_weighted_distance(points: Tensor, valid: Tensor, confidence: Tensor | None = None) -> Tensor:
    """CUT3R's "avg_dis" unit: Σ w |p| / Σ w over the valid points of a sample, at least 0.001.

    Args:
        points: [B, ..., 3], for training every view's points in its own camera and in the first one's, stacked.
        valid: [B, ...] bool.
        confidence: [B, ...] ≥ 1; the weight is max(log confidence, 0.001), detached. The prediction's confidence weighs
            the truth, too. None weighs all alike.

    Returns:
        [B]; gradients flow through `points`.
    """
    check_trailing("points", points, *valid.shape, 3)
    # Not a product with the mask: invalid points may be NaN.
    distance = torch.where(valid[..., None], points, 0.0).flatten(1, -2).norm(dim=-1)
    weights = torch.ones_like(distance)
    if confidence is not None:
        weights = confidence.detach().log().clamp(min=_CUT3R_MIN_WEIGHT).flatten(1)
    weights = weights * valid.flatten(1)
    mean = (weights * distance).sum(-1) / (weights.sum(-1) + _CUT3R_EPS)
    return mean.clamp(min=CUT3R_MIN_SCALE)


@full_precision
def distance_to_median(points: Tensor, valid: Tensor) -> Tensor:
    """CUT3R's robust unit: median distance of a sample's valid points to their coordinate-wise median.

    Args:
        points: [B, ..., 3].
        valid: [B, ...] bool.

    Returns:
        [B]; lower medians.
    """
    check_trailing("points", points, *valid.shape, 3)
    points, valid = points.flatten(1, -2), valid.flatten(1)
    center = masked_median(points.mT, valid[:, None])
    return masked_median((points - center[:, None]).norm(dim=-1), valid)


@full_precision
def to_first_pose(camera_to_world: Tensor) -> Tensor:
    """Poses [..., V, 3, 4], camera to world, with the first view's camera as the world (CUT3R's target)."""
    return compose_se3(invert_se3(camera_to_world[..., :1, :, :]), camera_to_world)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
