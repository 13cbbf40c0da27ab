"""VGGT's training objective: cameras, depth, points and tracks of one batch (arXiv 2503.11651, section 3.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from restrike.geometry import encode_pose_fov
from restrike.losses.camera import CameraDistance, camera_loss
from restrike.losses.dense import SurfaceTerm, dense_loss
from restrike.losses.track import track_loss


class MultiViewTargets(NamedTuple):
    """What predictions are compared with, after `restrike.geometry.normalize_to_mean_distance`.

    Attributes:
        world_to_camera: [B, V, 3, 4], first camera as world.
        intrinsics: [B, V, 3, 3], pixels.
        depth: [B, V, H, W].
        points_world: [B, V, H, W, 3].
        valid: [B, V, H, W] bool.
        tracks: [B, V, N, 2] pixels; None without tracks.
        track_visible: [B, V, N] bool; None without tracks.
    """

    world_to_camera: Tensor
    intrinsics: Tensor
    depth: Tensor
    points_world: Tensor
    valid: Tensor
    tracks: Tensor | None = None
    track_visible: Tensor | None = None


class LossWeights(NamedTuple):
    """Weights of the heads; 0 leaves a head out. Defaults are those of the release's fine-tuning on CO3D."""

    camera: float = 5.0
    depth: float = 1.0
    point: float = 0.0
    track: float = 0.0


def multiview_loss(
    predictions: Mapping[str, Any],
    targets: MultiViewTargets,
    weights: LossWeights = LossWeights(),  # noqa: B008
    camera_distance: CameraDistance = "l1",
    depth_surface: SurfaceTerm = "grad",
    point_surface: SurfaceTerm = "normal",
    valid_range: float = 0.98,
) -> dict[str, Tensor]:
    """Objective of a batch and its parts.

    Args:
        predictions: As `restrike.models.vggt.VGGT` returns them in training.
        targets: See there.
        weights: See there.
        camera_distance: See `camera_loss`.
        depth_surface: See `dense_loss`.
        point_surface: Likewise.
        valid_range: Likewise, for depth and points.

    Returns:
        "loss", to be minimised; the rest is to be logged: "loss_camera", "loss_translation", "loss_rotation",
        "loss_fov", "loss_depth", "loss_depth_confidence", "loss_depth_regression", "loss_depth_gradient", and likewise
        "loss_point…" and "loss_track…". Parts are unweighted.

    Raises:
        ValueError: a weight without the head or the targets that it needs.
    """
    _check(predictions, targets, weights)
    losses: dict[str, Tensor] = {}
    if weights.camera:
        size = targets.valid.shape[-2], targets.valid.shape[-1]
        encoding = encode_pose_fov(targets.world_to_camera, targets.intrinsics, size)
        camera = camera_loss(predictions["pose_enc_list"], encoding, targets.valid, camera_distance)
        losses |= {"loss_camera": camera.total} | {f"loss_{k}": v for k, v in camera._asdict().items()}
    if weights.depth:
        depth = dense_loss(
            predictions["depth"],
            predictions["depth_conf"],
            targets.depth[..., None],
            targets.valid,
            depth_surface,
            valid_range,
        )
        losses |= {"loss_depth": depth.total} | {f"loss_depth_{k}": v for k, v in depth._asdict().items()}
    if weights.point:
        point = dense_loss(
            predictions["world_points"],
            predictions["world_points_conf"],
            targets.points_world,
            targets.valid,
            point_surface,
            valid_range,
        )
        losses |= {"loss_point": point.total} | {f"loss_point_{k}": v for k, v in point._asdict().items()}
    if weights.track:
        assert targets.tracks is not None and targets.track_visible is not None
        logits = predictions["vis_logits"], predictions["conf_logits"]
        track = track_loss(predictions["track_list"], *logits, targets.tracks, targets.track_visible)
        losses |= {"loss_track": track.total} | {f"loss_track_{k}": v for k, v in track._asdict().items()}
    total = sum(weight * losses[f"loss_{name}"] for name, weight in weights._asdict().items() if weight)
    return {"loss": total, **losses}  # type: ignore[dict-item]


_NEEDED = {"camera": "pose_enc_list", "depth": "depth", "point": "world_points", "track": "track_list"}


def _check(predictions: Mapping[str, Any], targets: MultiViewTargets, weights: LossWeights) -> None:
    wanted = [name for name, weight in weights._asdict().items() if weight]
    if not wanted:
        raise ValueError("all weights of the loss are 0; give at least one head a weight")
    for name in wanted:
        if _NEEDED[name] not in predictions:
            raise ValueError(
                f"the loss of the {name} head has weight {getattr(weights, name)}, but the model predicts no "
                f"{_NEEDED[name]!r}; build it with enable_{name}=True"
                + (", and give it query points" if name == "track" else "")
                + " or set the weight to 0"
            )
    if weights.track and (targets.tracks is None or targets.track_visible is None):
        raise ValueError("the loss of the track head needs targets with tracks; the data has none: set its weight to 0")
