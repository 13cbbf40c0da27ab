"""Similarity and rigid alignment of corresponding points in closed form (Umeyama 1991; Kabsch 1976)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from restrike.geometry.conventions import check_trailing, full_precision
from restrike.geometry.rotations import align_left, multiply, nearest_rotation, rotate, svd_or_nan


class Similarity(NamedTuple):
    """x -> scale · R x + t: scale [...], rotation [..., 3, 3], translation [..., 3]."""

    scale: Tensor
    rotation: Tensor
    translation: Tensor

    def apply(self, points: Tensor) -> Tensor:
        """Map points [*lead, *any, 3]."""
        scaled = align_left(self.scale[..., None, None] * self.rotation, points)
        return rotate(scaled, points) + align_left(self.translation[..., None], points)[..., 0]

    def apply_to_cameras(self, camera_to_world: Tensor) -> Tensor:
        """Map cameras [*lead, V, 3, 4]: centres as points, orientations by the rotation alone."""
        rotation = multiply(self.rotation[..., None, :, :], camera_to_world[..., :3])
        return torch.cat([rotation, self.apply(camera_to_world[..., 3])[..., None]], dim=-1)


@full_precision
def umeyama(source: Tensor, target: Tensor, weights: Tensor | None = None, with_scale: bool = True) -> Similarity:
    """Similarity that brings `source` nearest to `target` in the (weighted) least-squares sense.

    Args:
        source: [..., N, 3], corresponding to
        target: [..., N, 3].
        weights: [..., N], ≥ 0; a mask will do.
        with_scale: False gives a rigid transform, scale 1.

    Returns:
        Similarity in the dtype of the input, NaN where points that count are not finite. Coincident source points give
        scale 0; fewer than three points, or points on a line, one of the many best rotations.
    """
    check_trailing("source", source, 3)
    check_trailing("target", target, *source.shape[-2:])
    if weights is None:
        weights = torch.ones_like(source[..., 0])
    share = (weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(source.dtype).tiny)).to(source)[..., None]
    # A masked-out point may hold NaN, which no zero weight would silence.
    source = torch.where(share > 0, source, 0.0)
    target = torch.where(share > 0, target, 0.0)
    source_mean, target_mean = (share * source).sum(-2, keepdim=True), (share * target).sum(-2, keepdim=True)
    centered, wanted = source - source_mean, target - target_mean
    covariance = torch.stack([(share * wanted * centered[..., k : k + 1]).sum(-2) for k in range(3)], dim=-1)
    u, singular, vt = svd_or_nan(covariance)
    signs = torch.ones_like(singular)
    signs[..., 2] = torch.where(torch.linalg.det(multiply(u, vt)) < 0, -1.0, 1.0)
    rotation = multiply(u * signs[..., None, :], vt)
    scale = torch.ones_like(singular[..., 0])
    if with_scale:
        variance = (share * centered.square()).sum((-2, -1))
        scale = (singular * signs).sum(-1) / variance.clamp(min=torch.finfo(source.dtype).tiny)
    translation = target_mean[..., 0, :] - scale[..., None] * rotate(rotation, source_mean[..., 0, :])
    return Similarity(scale, rotation, translation)


@full_precision
def align_cameras(source: Tensor, target: Tensor) -> Similarity:
    """Similarity that brings cameras `source` to `target`, well defined for any number of them, on a line too.

    The rotation is the nearest one to all orientations, the scale the ratio of the centres' spreads, 1 where either has
    none; centroids meet.

    Args:
        source: camera_to_world [..., V, 3, 4], corresponding to
        target: camera_to_world [..., V, 3, 4].
    """
    check_trailing("source", source, 3, 4)
    check_trailing("target", target, *source.shape[-3:])
    rotation = nearest_rotation(multiply(target[..., :3], source[..., :3].mT).mean(-3))
    centers = source[..., 3], target[..., 3]
    means = [x.mean(-2) for x in centers]
    spreads = [(x - mean[..., None, :]).square().sum((-2, -1)) for x, mean in zip(centers, means, strict=True)]
    tiny = torch.finfo(source.dtype).tiny
    has_both = (spreads[0] > tiny) & (spreads[1] > tiny)
    scale = torch.where(has_both, (spreads[1] / spreads[0].clamp(min=tiny)).sqrt(), 1.0)
    return Similarity(scale, rotation, means[1] - scale[..., None] * rotate(rotation, means[0]))
