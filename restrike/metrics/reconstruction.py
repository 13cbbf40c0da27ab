"""How right is a predicted point cloud: Chamfer, accuracy, completeness, normal consistency, and their alignments.

All arithmetic is float64; nearest neighbours are exact. Protocols: `docs/protocols.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from restrike.geometry import distance_to_median, estimate_normals, masked_median, nearest_neighbors, umeyama
from restrike.metrics.grouping import GroupedMean


class ChamferDistance(NamedTuple):
    """Of one scene, in units of the true cloud's mean distance from its mean."""

    chamfer: Tensor
    mean_distance: Tensor


def chamfer_distance(predicted: Tensor, true: Tensor, valid: Tensor | None = None) -> ChamferDistance:
    """DiffusionSfM's Chamfer distance of corresponding maps: similarity alignment, unit size, squared both ways.

    Args:
        predicted: [..., 3], each point meant to be
        true: [..., 3].
        valid: [...] bool, the points that count (depth known; and on the object, for CD_Obj).

    Returns:
        Sum of the two mean *squared* nearest distances, and the mean distance of corresponding points.
    """
    if predicted.shape != true.shape:
        raise ValueError(f"corresponding clouds: expected one shape, got {list(predicted.shape)}, {list(true.shape)}")
    keep = torch.ones(true.shape[:-1], dtype=torch.bool, device=true.device) if valid is None else valid
    predicted, true = predicted[keep].double(), true[keep].double()
    if len(true) < 3:
        raise ValueError(f"Chamfer distance needs 3 valid points or more, got {len(true)}")
    aligned = umeyama(predicted, true).apply(predicted)
    center = true.mean(0)
    unit = (true - center).norm(dim=-1).mean()
    aligned, true = (aligned - center) / unit, (true - center) / unit
    there, back = nearest_neighbors(aligned, true), nearest_neighbors(true, aligned)
    chamfer = there.distances.square().mean() + back.distances.square().mean()
    return ChamferDistance(chamfer, (aligned - true).norm(dim=-1).mean())


class CloudErrors(NamedTuple):
    """Of one cloud against another: distances in scene units, |cosines| of normals in [0, 1]."""

    mean: Tensor
    median: Tensor
    normal_mean: Tensor
    normal_median: Tensor


def cloud_errors(
    source: Tensor, target: Tensor, source_normals: Tensor | None = None, target_normals: Tensor | None = None
) -> CloudErrors:
    """Distances from each source point to the target, and agreement of the normals there.

    Accuracy is from the prediction to the truth, completeness from the truth to the prediction.

    Args:
        source: [N, 3].
        target: [M, 3].
        source_normals: [N, 3] unit; None: `estimate_normals`.
        target_normals: [M, 3] unit.

    Returns:
        Float64; medians of an even number are the mean of the middle two.
    """
    source, target = source.double(), target.double()
    near = nearest_neighbors(source, target)
    normals = estimate_normals(source) if source_normals is None else source_normals.double()
    others = estimate_normals(target) if target_normals is None else target_normals.double()
    cosine = (normals * others[near.indices[:, 0]]).sum(-1).abs()
    distances = near.distances[:, 0]
    return CloudErrors(distances.mean(), distances.quantile(0.5), cosine.mean(), cosine.quantile(0.5))


class MedianAlignment(NamedTuple):
    """Clouds [..., 3] without their median depth, the prediction scaled; the medians and units used."""

    predicted: Tensor
    true: Tensor
    predicted_shift: Tensor
    true_shift: Tensor
    predicted_scale: Tensor
    true_scale: Tensor


def align_by_medians(predicted: Tensor, true: Tensor, valid: Tensor) -> MedianAlignment:
    """CUT3R's alignment of multi-view reconstructions in the first camera's frame.

    Each side loses its own median z; the prediction is scaled by the ratio of the median distances to the median point.
    Both then get the truth's median z back (add `true_shift` to z) before they go to the world.

    Args:
        predicted: [..., 3], all views of a scene.
        true: [..., 3].
        valid: [...] bool.
    """
    predicted, true, keep = predicted.double(), true.double(), valid.flatten()[None]
    shifted, shifts, scales = [], [], []
    for points in (predicted, true):
        shift = masked_median(points[..., 2].flatten(), keep[0])
        points = points - torch.stack([torch.zeros_like(shift), torch.zeros_like(shift), shift])
        shifted.append(points)
        shifts.append(shift)
        scales.append(distance_to_median(points.reshape(1, -1, 3), keep)[0])
    return MedianAlignment(shifted[0] * (scales[1] / scales[0]), shifted[1], *shifts, *scales)


class Chamfer(Metric):
    """DiffusionSfM's table: median over sequences, then over categories, then the mean over frame orders.

    `compute` returns "chamfer". Every scene's value is kept until then (a median needs them), three numbers each.

    Args:
        groups: Category names; None: one pool.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    scenes: list[Tensor]

    def __init__(self, groups: Sequence[str] | None = None) -> None:
        super().__init__()
        self.groups = GroupedMean(groups)
        # Flat, and float64: a rank without scenes gathers an empty vector of this dtype, which must fit the others'.
        self.add_state("scenes", [], dist_reduce_fx="cat")
        self.set_dtype(torch.float64)

    def update(
        self,
        predicted: Tensor,
        true: Tensor,
        mask: Tensor,
        group: Sequence[str] | None = None,
        order: int = 0,
        valid: Tensor | None = None,
    ) -> None:
        """Add scenes: points [B, ..., 3] twice, mask [B, ...] of those that count, frame order, valid [B] bool."""
        index = self.groups.index(group, len(true), true.device)
        used = torch.ones(len(true), dtype=torch.bool) if valid is None else valid.cpu()
        for scene in used.nonzero()[:, 0].tolist():
            value = chamfer_distance(predicted[scene], true[scene], mask[scene]).chamfer
            self.scenes.append(torch.stack([value.new_tensor(float(order)), index[scene].to(value), value]))

    def compute(self) -> dict[str, Tensor]:
        """{"chamfer": value}; NaN before the first scene. Medians of an even number are the mean of the middle two."""
        gathered = self.scenes if isinstance(self.scenes, Tensor) else dim_zero_cat(self.scenes or [torch.zeros(0)])
        order, group, value = gathered.double().view(-1, 3).unbind(-1)
        orders = []
        for o in order.unique():
            categories = [value[(order == o) & (group == k)].quantile(0.5) for k in group[order == o].unique()]
            orders.append(torch.stack(categories).quantile(0.5))
        return {"chamfer": torch.stack(orders).mean() if orders else value.new_tensor(float("nan"))}


class ReconstructionErrors(Metric):
    """Mean over scenes of accuracy, completeness, their mean ("overall"), normal consistency, and medians per scene."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    scenes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(8, dtype=torch.float64), "sum")
        self.add_state("scenes", torch.zeros((), dtype=torch.float64), "sum")

    def update(
        self,
        predicted: Tensor,
        true: Tensor,
        predicted_normals: Tensor | None = None,
        true_normals: Tensor | None = None,
    ) -> None:
        """Add one scene, aligned already: clouds [N, 3] and [M, 3], unit normals or None to estimate them."""
        normals = estimate_normals(predicted) if predicted_normals is None else predicted_normals
        others = estimate_normals(true) if true_normals is None else true_normals
        accuracy = cloud_errors(predicted, true, normals, others)
        completeness = cloud_errors(true, predicted, others, normals)
        self.total += torch.stack([*accuracy, *completeness]).to(self.total)
        self.scenes += 1

    def compute(self) -> dict[str, Tensor]:
        """Name -> mean over scenes; NaN before the first one."""
        accuracy, completeness = (self.total / self.scenes).split(4)
        return {
            "accuracy": accuracy[0],
            "accuracy_median": accuracy[1],
            "completeness": completeness[0],
            "completeness_median": completeness[1],
            "overall": (accuracy[0] + completeness[0]) / 2,
            "normal_consistency": (accuracy[2] + completeness[2]) / 2,
            "normal_consistency_median": (accuracy[3] + completeness[3]) / 2,
        }
