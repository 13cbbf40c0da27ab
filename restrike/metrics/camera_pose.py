"""How right are predicted cameras: pairwise angles (RRA, RTA, mAA, AUC), centres, trajectories.

All arithmetic is float64, whatever the input. States are sums of fixed size, so ranks add up exactly like one process.
Protocols, averaging orders and their sources: `docs/protocols.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from restrike.geometry import (
    camera_centers,
    compose_se3,
    invert_se3,
    matrix_to_quaternion,
    rotation_angle,
    to_first_camera,
    umeyama,
)
from restrike.metrics.grouping import GroupedMean

RelativePose = Literal["camera", "released"]
Average = Literal["pair", "sequence"]

_ROUNDING = 1e-6  # of float32 cameras, relative to their distance from the world's origin
_BINS = 180  # of one degree: every threshold of the field is a whole number of them


class PairErrors(NamedTuple):
    """Radians, [..., V(V-1)/2] each, pairs (0,1), (0,2), …, (1,2), …"""

    rotation: Tensor
    translation: Tensor


def pairwise_pose_errors(predicted: Tensor, true: Tensor, relative: RelativePose = "camera") -> PairErrors:
    """Angles between predicted and true relative poses of all pairs of views.

    Args:
        predicted: [..., V, 3, 4], world_to_camera.
        true: [..., V, 3, 4], world_to_camera.
        relative: "camera": E_i E_j⁻¹, which no choice of world changes. "released": E_i⁻¹ E_j after both sets have
            their first camera as the world, as VGGT's script does it.

    Returns:
        Rotation in [0, π]; direction of translation folded to [0, π/2], since a baseline's sign is not observable.
        Cameras in one place have no direction between them: π/2, as in the released scripts.
    """
    _check_cameras(predicted, true)
    i, j = torch.triu_indices(true.shape[-3], true.shape[-3], offset=1, device=true.device)
    first, second = (_relative(cameras.double(), i, j, relative) for cameras in (predicted, true))
    cross = torch.linalg.cross(first[..., 3], second[..., 3]).norm(dim=-1)
    dot = (first[..., 3] * second[..., 3]).sum(-1).abs()
    has_direction = _has_baseline(predicted, i, j, first) & _has_baseline(true, i, j, second)
    angle = torch.where(has_direction, torch.atan2(cross, dot), torch.pi / 2)
    return PairErrors(_quaternion_angle(first[..., :3], second[..., :3]), angle)


def center_errors(predicted: Tensor, true: Tensor, scene_scale: Tensor | None = None) -> Tensor:
    """Distances of predicted camera centres, brought onto the true ones by the best similarity, in scene scales.

    Args:
        predicted: [..., V, 3, 4], world_to_camera.
        true: [..., V, 3, 4], world_to_camera.
        scene_scale: [...]; default that of `true`. DiffusionSfM takes it over all cameras of the sequence, not only
            over those that were shown.

    Returns:
        [..., V] float64.
    """
    _check_cameras(predicted, true)
    centers, true_centers = camera_centers(predicted.double()), camera_centers(true.double())
    if scene_scale is None:
        scene_scale = camera_scene_scale(true)
    aligned = umeyama(centers, true_centers).apply(centers)
    return (aligned - true_centers).norm(dim=-1) / scene_scale.double()[..., None]


def camera_scene_scale(world_to_camera: Tensor) -> Tensor:
    """Largest distance of a camera's centre from the mean centre: [...] float64 from [..., V, 3, 4]."""
    centers = camera_centers(world_to_camera.double())
    return (centers - centers.mean(-2, keepdim=True)).norm(dim=-1).amax(-1)


class TrajectoryErrors(NamedTuple):
    """Root mean squares, [...] float64: scene units, scene units, radians."""

    ate: Tensor
    rpe_translation: Tensor
    rpe_rotation: Tensor


def trajectory_errors(predicted: Tensor, true: Tensor) -> TrajectoryErrors:
    """ATE and RPE over consecutive frames after similarity alignment of all positions (Sturm et al. 2012).

    Args:
        predicted: [..., V, 3, 4], camera_to_world, in time order.
        true: [..., V, 3, 4], camera_to_world.
    """
    _check_cameras(predicted, true)
    predicted, true = predicted.double(), true.double()
    aligned = umeyama(predicted[..., 3], true[..., 3]).apply_to_cameras(predicted)
    steps, true_steps = (
        compose_se3(invert_se3(poses[..., :-1, :, :]), poses[..., 1:, :, :]) for poses in (aligned, true)
    )
    difference = compose_se3(invert_se3(true_steps), steps)
    return TrajectoryErrors(
        _root_mean_square((aligned[..., 3] - true[..., 3]).norm(dim=-1)),
        _root_mean_square(difference[..., 3].norm(dim=-1)),
        _root_mean_square(rotation_angle(difference[..., :3])),
    )


class PoseAccuracy(Metric):
    """RRA, RTA, mAA and AUC over all pairs of views, from histograms of one-degree bins.

    `compute` returns "rra@15" (share of pairs below 15° in rotation), "rta@15" (in translation), "maa@30" (mean over
    τ = 1..30 of min(RRA@τ, RTA@τ), the papers' wording) and "auc@30" (mean over τ of the share whose larger angle is
    below τ: the released scripts, and the published numbers).

    Args:
        rra: Thresholds in whole degrees.
        rta: Thresholds in whole degrees.
        maa: Thresholds in whole degrees.
        auc: Thresholds in whole degrees.
        groups: Names whose results are averaged with equal weight (categories; category and order). None: one pool.
        average: Within a group: "pair" pools all pairs, "sequence" gives each sequence the same weight. They differ
            only where sequences differ in V, but for mAA, whose minimum is always of the pool.
        relative: As in `pairwise_pose_errors`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    histogram: Tensor
    weight: Tensor

    def __init__(
        self,
        rra: Sequence[int] = (5, 15, 30),
        rta: Sequence[int] = (5, 15, 30),
        maa: Sequence[int] = (30,),
        auc: Sequence[int] = (3, 5, 10, 15, 30),
        groups: Sequence[str] | None = None,
        average: Average = "pair",
        relative: RelativePose = "camera",
    ) -> None:
        super().__init__()
        thresholds = {"rra": rra, "rta": rta, "maa": maa, "auc": auc}
        for name, values in thresholds.items():
            if any(value != int(value) or not 1 <= value <= _BINS for value in values):
                raise ValueError(f"{name}: thresholds must be whole degrees from 1 to {_BINS}, got {list(values)}")
        if average not in ("pair", "sequence"):
            raise ValueError(f"average: expected 'pair' or 'sequence', got {average!r}")
        self.thresholds = {name: [int(value) for value in values] for name, values in thresholds.items()}
        self.average, self.relative = average, relative
        self.groups = GroupedMean(groups)
        # Rows: rotation, translation, the larger of the two.
        self.add_state("histogram", torch.zeros(len(self.groups), 3, _BINS, dtype=torch.float64), "sum")
        self.add_state("weight", torch.zeros(len(self.groups), dtype=torch.float64), "sum")

    def update(
        self, predicted: Tensor, true: Tensor, group: Sequence[str] | None = None, valid: Tensor | None = None
    ) -> None:
        """Add scenes: world_to_camera [B, V, 3, 4] twice, group names [B], valid [B] bool (False: padding)."""
        rotation, translation = pairwise_pose_errors(predicted, true, self.relative)
        errors = torch.stack([rotation, translation, torch.maximum(rotation, translation)], dim=1)
        # NaN, from a diverged network, is the worst error, not a missing one.
        degrees = torch.rad2deg(errors).nan_to_num(nan=float(_BINS))
        bins = degrees.floor().clamp(max=_BINS).long()  # the last bin, 180°, is below no threshold
        counts = torch.zeros(*bins.shape[:2], _BINS + 1, dtype=torch.float64, device=bins.device)
        counts.scatter_add_(-1, bins, torch.ones_like(degrees))
        weight = counts.new_full((len(counts),), float(bins.shape[-1]))
        if self.average == "sequence":
            counts, weight = counts / bins.shape[-1], torch.ones_like(weight)
        index = self.groups.index(group, len(counts), counts.device)
        used = torch.ones_like(weight) if valid is None else valid.to(weight)
        self.histogram.index_add_(0, index, counts[..., :_BINS] * used[:, None, None])
        self.weight.index_add_(0, index, weight * used)

    def compute_groups(self) -> dict[str, Tensor]:
        """Each value as `compute` has it, [groups], NaN for a group without a pair."""
        below = self.histogram.cumsum(-1) / self.weight[:, None, None]  # [..., τ - 1]: share below τ degrees
        rra, rta, both = below.unbind(1)
        result = {f"rra@{t}": rra[:, t - 1] for t in self.thresholds["rra"]}
        result |= {f"rta@{t}": rta[:, t - 1] for t in self.thresholds["rta"]}
        result |= {f"maa@{t}": torch.minimum(rra, rta)[:, :t].mean(-1) for t in self.thresholds["maa"]}
        return result | {f"auc@{t}": both[:, :t].mean(-1) for t in self.thresholds["auc"]}

    def compute(self) -> dict[str, Tensor]:
        """Name -> share in [0, 1], averaged over the groups that were seen; NaN before the first pair."""
        return {name: values.nanmean() for name, values in self.compute_groups().items()}


class CameraCenterAccuracy(Metric):
    """Share of camera centres nearer than a threshold, in scene scales, after similarity alignment of each scene.

    `compute` returns "center_acc@0.1" and so on: mean over cameras, sequences (with equal weight), then groups.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    hits: Tensor
    sequences: Tensor

    def __init__(self, thresholds: Sequence[float] = (0.1, 0.2), groups: Sequence[str] | None = None) -> None:
        super().__init__()
        self.thresholds = tuple(thresholds)
        self.groups = GroupedMean(groups)
        self.add_state("hits", torch.zeros(len(self.groups), len(self.thresholds), dtype=torch.float64), "sum")
        self.add_state("sequences", torch.zeros(len(self.groups), dtype=torch.float64), "sum")

    def update(
        self,
        predicted: Tensor,
        true: Tensor,
        scene_scale: Tensor | None = None,
        group: Sequence[str] | None = None,
        valid: Tensor | None = None,
    ) -> None:
        """Add scenes: world_to_camera [B, V, 3, 4] twice, `camera_scene_scale` [B], groups [B], valid [B] bool."""
        errors = center_errors(predicted, true, scene_scale)
        thresholds = errors.new_tensor(self.thresholds)
        shares = (errors[..., None] < thresholds).double().mean(1)
        used = torch.ones_like(shares[:, 0]) if valid is None else valid.to(shares)
        index = self.groups.index(group, len(shares), shares.device)
        self.hits.index_add_(0, index, shares * used[:, None])
        self.sequences.index_add_(0, index, used)

    def compute(self) -> dict[str, Tensor]:
        """Name -> share in [0, 1]; NaN before the first sequence."""
        shares = (self.hits / self.sequences[:, None]).nanmean(0)
        return {f"center_acc@{t:g}": share for t, share in zip(self.thresholds, shares, strict=True)}


class TrajectoryError(Metric):
    """Mean over sequences of "ate", "rpe_translation" (scene units) and "rpe_rotation" (degrees)."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    sequences: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(3, dtype=torch.float64), "sum")
        self.add_state("sequences", torch.zeros((), dtype=torch.float64), "sum")

    def update(self, predicted: Tensor, true: Tensor, valid: Tensor | None = None) -> None:
        """Add sequences of one length: camera_to_world [B, V, 3, 4] twice, valid [B] bool (False: padding)."""
        errors = torch.stack(trajectory_errors(predicted, true), dim=-1)
        used = torch.ones_like(errors[:, 0]) if valid is None else valid.to(errors)
        self.total += torch.where(used[:, None] > 0, errors, 0.0).sum(0)
        self.sequences += used.sum()

    def compute(self) -> dict[str, Tensor]:
        """Name -> mean; NaN before the first sequence."""
        ate, translation, rotation = self.total / self.sequences
        return {"ate": ate, "rpe_translation": translation, "rpe_rotation": rotation * (180 / math.pi)}


def _relative(cameras: Tensor, i: Tensor, j: Tensor, relative: str) -> Tensor:
    if relative == "camera":
        return compose_se3(cameras[..., i, :, :], invert_se3(cameras[..., j, :, :]))
    if relative == "released":
        cameras = to_first_camera(cameras)
        return compose_se3(invert_se3(cameras[..., i, :, :]), cameras[..., j, :, :])
    raise ValueError(f"relative: expected 'camera' or 'released', got {relative!r}")


def _has_baseline(cameras: Tensor, i: Tensor, j: Tensor, relative: Tensor) -> Tensor:
    """Whether two cameras lie apart by more than float32 rounding, [..., pairs]; NaN counts as apart."""
    reach = cameras[..., 3].double().norm(dim=-1)
    return ~(relative[..., 3].norm(dim=-1) <= _ROUNDING * (reach[..., i] + reach[..., j]))


def _quaternion_angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle between rotations [..., 3, 3], by quaternions as the released scripts have it.

    On matrices that float32 left slightly off a rotation, other formulae differ by 1e-4 of a small angle.
    """
    cosine = (matrix_to_quaternion(first, "xyzw") * matrix_to_quaternion(second, "xyzw")).sum(-1)
    return torch.acos(1 - 2 * (1 - cosine.square()).clamp(min=0.0))


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def _check_cameras(predicted: Tensor, true: Tensor) -> None:
    if predicted.shape != true.shape or true.shape[-2:] != (3, 4) or true.ndim < 3 or true.shape[-3] < 2:
        raise ValueError(
            f"predicted and true cameras: expected the same shape [..., V >= 2, 3, 4], "
            f"got {list(predicted.shape)} and {list(true.shape)}"
        )
