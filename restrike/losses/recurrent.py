"""CUT3R's objective: points in two frames with confidences, poses and colours of a sequence (arXiv 2501.12387, 3.4).

Truth and prediction are divided by their own unit of length, each sample by itself; a sample in metres is divided by
the truth's unit alone, so its scale has to be learnt. All terms are means over pixels of the batch, not of the sample.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from restrike.geometry import (
    compose_se3,
    confidence_weighted_distance,
    distance_to_median,
    encode_pose,
    full_precision,
    invert_se3,
    transform_points,
)
from restrike.geometry.normalization import CUT3R_MIN_SCALE
from restrike.losses.robust import masked_mean

SKY_DISTANCE = 2.0  # in units of the scene: the error that a pixel of the sky counts with
_MIN_DEPTH = 1e-6
_MAX_SLOPE = 2.0
_SCALE_RANGE = (1e-3, 1e3)


class PointmapPredictions(Protocol):
    """What `restrike.models.cut3r.Predictions` has; leading dimensions [B, V]."""

    points_camera: Tensor
    confidence_camera: Tensor
    points_world: Tensor
    confidence_world: Tensor
    colors: Tensor
    poses: Tensor


class RecurrentTargets(NamedTuple):
    """Truth of a batch of sequences; the world is the first view's camera, or another anchor's.

    Attributes:
        points_camera: [B, V, H, W, 3], in each view's own camera.
        points_world: [B, V, H, W, 3].
        poses: [B, V, 3, 4], camera to world.
        valid: [B, V, H, W] bool, where points are known.
        sky: [B, V, H, W] bool, nowhere valid.
        images: [B, V, 3, H, W] in [-1, 1].
        is_metric: [B] bool, lengths are metres.
        is_camera_only: [B] bool, depth is unknown: only the pose and the directions of points count.
        is_single_view: [B] bool, views show different places.
        is_depth_only: [B] bool, only relative depth counts.
        image_mask: [B, V] bool, views that the model has seen an image of.
    """

    points_camera: Tensor
    points_world: Tensor
    poses: Tensor
    valid: Tensor
    sky: Tensor
    images: Tensor
    is_metric: Tensor
    is_camera_only: Tensor
    is_single_view: Tensor
    is_depth_only: Tensor
    image_mask: Tensor

    def views(self, start: int, stop: int) -> RecurrentTargets:
        """A part of each sequence, in the same world."""
        names = ("points_camera", "points_world", "poses", "valid", "sky", "images", "image_mask")
        return self._replace(**{name: getattr(self, name)[:, start:stop] for name in names})


@full_precision
def recurrent_targets(
    points_world: Tensor,
    camera_to_world: Tensor,
    valid: Tensor,
    sky: Tensor,
    images: Tensor,
    anchor: Tensor | None = None,
    is_metric: Tensor | None = None,
    is_camera_only: Tensor | None = None,
    is_single_view: Tensor | None = None,
    is_depth_only: Tensor | None = None,
    image_mask: Tensor | None = None,
) -> RecurrentTargets:
    """Targets in the anchor's frame.

    Args:
        points_world: [B, V, H, W, 3], any world.
        camera_to_world: [B, V, 3, 4].
        anchor: [B, 3, 4], camera to world; None takes the first view's.
        others: As in `RecurrentTargets`; flags are False, masks True where not given.
    """
    batch = len(valid)
    to_anchor = invert_se3(camera_to_world[:, 0] if anchor is None else anchor)

    def flag(given: Tensor | None) -> Tensor:
        return torch.zeros(batch, dtype=torch.bool, device=valid.device) if given is None else given

    return RecurrentTargets(
        points_camera=transform_points(invert_se3(camera_to_world), points_world),
        points_world=transform_points(to_anchor, points_world),
        poses=compose_se3(to_anchor[:, None], camera_to_world),
        valid=valid,
        sky=sky & ~valid,
        images=images,
        is_metric=flag(is_metric),
        is_camera_only=flag(is_camera_only),
        is_single_view=flag(is_single_view),
        is_depth_only=flag(is_depth_only),
        image_mask=torch.ones_like(valid[:, :, 0, 0]) if image_mask is None else image_mask,
    )


def recurrent_loss(
    predictions: PointmapPredictions,
    targets: RecurrentTargets,
    is_mixed: bool = True,
    alpha: float = 0.2,
    color_weight: float = 1.0,
    released_pose_mask: bool = False,
) -> dict[str, Tensor]:
    """The training objective and its parts.

    Args:
        predictions: See there.
        targets: See there.
        is_mixed: Compare samples of single views and of relative depth by measures of their own ("BatchList").
        alpha: Weight of - ln confidence.
        color_weight: Weight of the squared error of colours.
        released_pose_mask: With `is_mixed`, drop a sample from the pose loss where its last view has no image, as
            released; otherwise drop the very views without image.

    Returns:
        "loss", to be minimised; "loss_pose"; "loss_color" [V]; for each frame, "distance_…" [V], the mean error of
        points, and "loss_…" [V], the same weighed by confidence; "…" is "camera" or "world".
    """
    units, p, t = _Units.of(predictions, targets), predictions, targets
    used = t.valid | t.sky
    parts: dict[str, Tensor] = {}
    frames = {
        "camera": (p.points_camera, p.confidence_camera, t.points_camera, used),
        "world": (p.points_world, p.confidence_world, t.points_world, used & ~_wide(t.is_camera_only, used)),
    }
    for name, (predicted, confidence, true, mask) in frames.items():
        predicted, true = units.scale_predicted(predicted), units.scale_true(true)
        if name == "camera":
            slopes = _wide(t.is_camera_only, predicted)
            predicted, true = (torch.where(slopes, _slopes(x), x) for x in (predicted, true))
        distance = _distance(predicted, true, mask, t, is_mixed)
        distance = torch.where(t.sky, SKY_DISTANCE, distance)
        trusted = torch.where(mask, confidence.float(), 1.0)
        weighed = distance * trusted - alpha * trusted.log()
        parts[f"distance_{name}"] = _per_view(distance.detach(), mask)
        parts[f"loss_{name}"] = _per_view(weighed, mask)
    parts["loss_pose"] = _pose_loss(units, p, t, is_mixed, released_pose_mask)
    parts["loss_color"] = (p.colors - t.images.movedim(2, -1)).square().mean(dim=(0, 2, 3, 4))
    points = torch.cat([parts["loss_camera"], parts["loss_world"]]).mean()
    loss = 2 * points + parts["loss_pose"] + color_weight * parts["loss_color"].mean()
    return {"loss": loss, **parts}


def recurrent_errors(predictions: PointmapPredictions, targets: RecurrentTargets) -> dict[str, Tensor]:
    """The test criterion: errors in the truth's own unit, lower is better; the sky is left out.

    Returns:
        "loss", the published sum; "distance_camera", "distance_world" [V]; "scale_invariant_camera",
        "scale_invariant_world" [V], each sample's prediction scaled to the truth's median distance from its median
        point; "loss_color" [V], mean Euclidean distance; "loss_pose", not part of the sum.
    """
    parts: dict[str, Tensor] = {}
    p, t = predictions, targets
    frames = {"camera": (p.points_camera, t.points_camera), "world": (p.points_world, t.points_world)}
    for name, (predicted, true) in frames.items():
        scale = distance_to_median(predicted, t.valid).clamp(*_SCALE_RANGE) / distance_to_median(true, t.valid)
        parts[f"distance_{name}"] = _per_view((predicted - true).norm(dim=-1), t.valid)
        rescaled = predicted / _wide(scale, predicted)
        parts[f"scale_invariant_{name}"] = _per_view((rescaled - true).norm(dim=-1), t.valid)
    parts["loss_color"] = (p.colors - t.images.movedim(2, -1)).norm(dim=-1).mean(dim=(0, 2, 3))
    difference = p.poses - encode_pose(t.poses)
    parts["loss_pose"] = difference[..., :3].norm(dim=-1).mean() + difference[..., 3:].norm(dim=-1).mean()
    summed = [value.sum() for name, value in parts.items() if name.startswith(("distance", "scale_invariant"))]
    return {"loss": torch.stack(summed).sum() + parts["loss_color"].mean(), **parts}


class _Units(NamedTuple):
    """Units of length [B] of truth and prediction, for points and for poses."""

    true: Tensor
    predicted: Tensor
    true_pose: Tensor
    predicted_pose: Tensor

    @classmethod
    def of(cls, p: PointmapPredictions, t: RecurrentTargets) -> _Units:
        valid = torch.stack([t.valid, t.valid], dim=1)
        confidence = torch.stack([p.confidence_camera, p.confidence_world], dim=1)
        both = ((t.points_camera, t.points_world), (p.points_camera, p.points_world))
        true, own = (confidence_weighted_distance(torch.stack(x, dim=1), valid, confidence) for x in both)
        predicted = torch.where(t.is_metric, true, own)
        true_shift, own_shift = (x.norm(dim=-1).mean(dim=1) for x in (t.poses[..., 3], p.poses[..., :3].float()))
        shift = torch.where(t.is_metric, true_shift, own_shift)
        return cls(
            true, predicted, torch.where(t.is_camera_only, true_shift, true),
            torch.where(t.is_camera_only, shift, predicted),
        )  # fmt: skip

    def scale_true(self, points: Tensor) -> Tensor:
        return points / _wide(self.true, points)

    def scale_predicted(self, points: Tensor) -> Tensor:
        return points / _wide(self.predicted, points)


def _distance(predicted: Tensor, true: Tensor, mask: Tensor, t: RecurrentTargets, is_mixed: bool) -> Tensor:
    """Error of each pixel, [B, V, H, W]; 0 outside the mask."""
    inside = mask[..., None]
    predicted, true = torch.where(inside, predicted, 0.0), torch.where(inside, true, 0.0)
    distance = (predicted - true).norm(dim=-1)
    if not is_mixed:
        return distance
    of_single = (_unit_mean(predicted, mask) - _unit_mean(true, mask)).norm(dim=-1)
    relative = (_standard_depth(predicted, mask) - _standard_depth(true, mask)).abs()
    distance = torch.where(_wide(t.is_single_view & ~t.is_metric, distance), of_single, distance)
    return torch.where(_wide(t.is_depth_only, distance), torch.where(mask, relative, 0.0), distance)


def _unit_mean(points: Tensor, mask: Tensor) -> Tensor:
    """Points divided by the mean length of each view's."""
    length = points.norm(dim=-1).sum(dim=(-2, -1)) / mask.sum(dim=(-2, -1)).clamp(min=1)
    return points / length.clamp(min=1e-8)[..., None, None, None]


def _standard_depth(points: Tensor, mask: Tensor) -> Tensor:
    """z minus its mean in each view, divided by the mean size of what is left."""
    count, z = mask.sum(dim=(-2, -1), keepdim=True).clamp(min=1), points[..., 2]
    centered = torch.where(mask, z - z.sum(dim=(-2, -1), keepdim=True) / count, 0.0)
    size = centered.abs().sum(dim=(-2, -1), keepdim=True) / count
    return centered / size.clamp(min=1e-8)


def _slopes(points: Tensor) -> Tensor:
    """Points of depth 1 on the same rays, kept within reach."""
    return (points / points[..., 2:].clamp(min=_MIN_DEPTH)).clamp(-_MAX_SLOPE, _MAX_SLOPE)


def _pose_loss(
    units: _Units, p: PointmapPredictions, t: RecurrentTargets, is_mixed: bool, released_pose_mask: bool
) -> Tensor:
    true = encode_pose(t.poses)
    scales = units.predicted_pose, units.true_pose
    used = (scales[0] > CUT3R_MIN_SCALE) & (scales[1] > CUT3R_MIN_SCALE)
    # Divided by 1 where it does not count: the unit of a camera that stands still is 0, and 0 times its NaN is NaN.
    lengths = [torch.where(used, scale, 1.0) for scale in scales]
    shifts = [shift[..., :3] / _wide(length, shift) for shift, length in zip((p.poses, true), lengths, strict=True)]
    used = used[:, None].expand_as(t.image_mask)
    if is_mixed:
        used = used & (t.image_mask[:, -1:] if released_pose_mask else t.image_mask)
    translation = (shifts[0] - shifts[1]).norm(dim=-1)
    rotation = (p.poses[..., 3:] - true[..., 3:]).norm(dim=-1)
    return masked_mean(translation, used) + masked_mean(rotation, used)


def _per_view(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the batch's masked pixels of each view, [V]; 0 where there is none."""
    axes = (0, 2, 3)
    return torch.where(mask, x, 0.0).sum(dim=axes) / mask.sum(dim=axes).clamp(min=1)


def _wide(per_sample: Tensor, like: Tensor) -> Tensor:
    """[B] to be broadcast against `like`."""
    return per_sample.view(-1, *(1,) * (like.ndim - 1))
