"""Everything that is reported of a recurrent reconstruction, by CUT3R's protocols (arXiv 2501.12387, section 4).

Trajectories: one similarity per sequence, then ATE and RPE. Video depth: one alignment per sequence; single-frame
depth: one ratio of medians per frame. Reconstruction: all views' points in the first camera, brought together by
medians, cropped to the central 224 pixels, refined by ICP. All alignments that the paper reports, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from restrike.geometry import register_icp, transform_points
from restrike.metrics.camera_pose import TrajectoryError
from restrike.metrics.depth import DepthErrors
from restrike.metrics.reconstruction import ReconstructionErrors, align_by_medians

_CENTER = 224  # pixels
_ICP_RADIUS = 0.1
_MIN_POINTS = 30
_DEPTH_NAMES = ("abs_rel", "delta@1.25")
_VIDEO_ALIGNMENTS = ("metric", "scale", "scale_shift")


class SceneGeometry(NamedTuple):
    """Of V views of B scenes; the world is the first view's camera.

    Attributes:
        camera_to_world: [B, V, 3, 4].
        depth: [B, V, H, W]; of the truth ≤ 0 where unknown.
        points_world: [B, V, H, W, 3].
    """

    camera_to_world: Tensor
    depth: Tensor
    points_world: Tensor

    def views(self, count: int) -> SceneGeometry:
        """The first views of each scene."""
        return SceneGeometry(*(x[:, :count] for x in self))


class RecurrentMetrics(nn.Module):
    """Names: "ate", "rpe_translation" (scene units), "rpe_rotation" (degrees); "abs_rel_…" and "delta@1.25_…" of video
    depth under "metric", "scale" and "scale_shift", and of "frame" depth; means of the losses; of reconstructions
    "accuracy", "completeness", "normal_consistency" and so on, see `ReconstructionErrors`.

    Args:
        losses: Names of losses, averaged over scenes.
        is_full: Also what costs more than the network: reconstruction, and depth by scale and shift.
        max_points: Of each cloud of a reconstruction; more are thinned evenly, in row-major order. None keeps all.
    """

    def __init__(self, losses: tuple[str, ...] = (), is_full: bool = False, max_points: int | None = None) -> None:
        super().__init__()
        self.trajectory = TrajectoryError()
        videos = _VIDEO_ALIGNMENTS if is_full else _VIDEO_ALIGNMENTS[:2]
        self.video_depth: Any = nn.ModuleDict({name: DepthErrors(name) for name in videos})  # type: ignore[arg-type]
        self.frame_depth = DepthErrors("median")
        self.reconstruction = ReconstructionErrors() if is_full else None
        self.losses: Any = nn.ModuleDict({name: MeanMetric() for name in losses})
        self.max_points = max_points

    def update(self, predicted: SceneGeometry, true: SceneGeometry, losses: Mapping[str, Tensor] | None = None) -> None:
        """Add scenes, and the losses of this batch by the names announced."""
        scenes = len(true.depth)
        self.trajectory.update(predicted.camera_to_world, true.camera_to_world)
        for metric in self.video_depth.values():
            metric.update(predicted.depth, true.depth)
        self.frame_depth.update(*(x.depth.flatten(0, 1)[:, None] for x in (predicted, true)))
        if self.reconstruction is not None:
            for i in range(scenes):
                mask = true.depth[i] > 0
                if clouds := aligned_clouds(predicted.points_world[i], true.points_world[i], mask, self.max_points):
                    self.reconstruction.update(*clouds)
        for name, value in (losses or {}).items():
            self.losses[name].update(value, weight=scenes)

    def compute(self) -> dict[str, Tensor]:
        """Name -> value, the same on all ranks; every rank has to take part."""
        values = dict(self.trajectory.compute())
        for name, metric in [*self.video_depth.items(), ("frame", self.frame_depth)]:
            computed = metric.compute()
            values |= {f"{key}_{name}": computed[key] for key in _DEPTH_NAMES}
        if self.reconstruction is not None:
            values |= self.reconstruction.compute()
        return values | {name: metric.compute() for name, metric in self.losses.items()}

    def reset(self) -> None:
        """Forget all scenes."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()


def aligned_clouds(
    predicted: Tensor, true: Tensor, mask: Tensor, max_points: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """One scene's clouds as CUT3R's evaluation compares them; None where too few points are known.

    Args:
        predicted: [V, H, W, 3], world = first camera.
        true: [V, H, W, 3].
        mask: [V, H, W] bool, where the truth is known.
        max_points: See `RecurrentMetrics`.

    Returns:
        Corresponding clouds [N, 3] float64, aligned by medians over all views, cropped, and refined by ICP.
    """
    kept = mask & _central(mask)
    if int(kept.sum()) < _MIN_POINTS:
        return None
    aligned = align_by_medians(predicted, true, mask)
    back = torch.stack([torch.zeros_like(aligned.true_shift)] * 2 + [aligned.true_shift])
    source, target = (x[kept] + back for x in (aligned.predicted, aligned.true))
    if max_points is not None:
        step = -(-len(target) // max_points)
        source, target = source[::step], target[::step]
    if not source.isfinite().all():
        return None
    return transform_points(register_icp(source, target, _ICP_RADIUS).transform, source), target


def _central(mask: Tensor) -> Tensor:
    """True in the central square of each map [..., H, W], which may be larger than the map."""
    inside = torch.zeros_like(mask)
    top, left = (max(0, (side - _CENTER) // 2) for side in mask.shape[-2:])
    inside[..., top : top + _CENTER, left : left + _CENTER] = True
    return inside
