"""The table of DiffusionSfM's evaluation (arXiv 2505.05473; protocol of RayDiffusion, arXiv 2402.14817).

One row a number of views: share of pairs with a rotation error below 15°, share of camera centres within 0.1 of the
scene's scale, Chamfer distance of all known depth and of the object alone. Shares are averaged over pairs, sequences,
categories and frame orders, in this order; Chamfer distances take the median over sequences and over categories, and
the mean over orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from restrike.metrics.camera_pose import center_errors, pairwise_pose_errors
from restrike.metrics.reconstruction import chamfer_distance

_ROTATION_DEGREES, _CENTER_SCALES = 15.0, 0.1
_MIN_POINTS = 3


class SceneScore(NamedTuple):
    """One scene with its first `views` frames of one order; a Chamfer distance is NaN where no point counts."""

    category: str
    sequence: str
    order: int
    views: int
    rra: float
    center_acc: float
    chamfer: float
    chamfer_object: float


def score_cameras(predicted: Tensor, true: Tensor, scene_scale: Tensor | None = None) -> tuple[float, float]:
    """Shares of right rotations (pairs below 15°) and of right centres of one scene.

    Args:
        predicted: [V, 3, 4], world_to_camera; NaN counts as wrong.
        true: [V, 3, 4].
        scene_scale: `camera_scene_scale` of the whole sequence; None: of these views.
    """
    rotation = torch.rad2deg(pairwise_pose_errors(predicted, true).rotation)
    centers = center_errors(predicted, true, scene_scale)
    return float((rotation < _ROTATION_DEGREES).double().mean()), float((centers < _CENTER_SCALES).double().mean())


def score_points(predicted: Tensor, true: Tensor, mask: Tensor, max_points: int | None = None) -> float:
    """Chamfer distance of one scene's maps [V, H, W, 3] where `mask` [V, H, W]; NaN below three points.

    Args:
        predicted: In any world and scale.
        true: In any other.
        mask: Known depth, or the object.
        max_points: Thin more points than that evenly; None compares all, as published.
    """
    keep = mask.nonzero()
    if max_points is not None and len(keep) > max_points:
        keep = keep[:: math.ceil(len(keep) / max_points)]
    predicted, true = (x[tuple(keep.unbind(-1))] for x in (predicted, true))
    if len(true) < _MIN_POINTS:
        return math.nan
    if not bool(predicted.isfinite().all()):
        return math.inf
    return float(chamfer_distance(predicted, true).chamfer)


def pose_table(scores: Iterable[SceneScore], categories: Collection[str] | None = None) -> dict[int, dict[str, float]]:
    """views → name → value over the scenes of some categories (None: all); empty where there is no scene."""
    chosen = [score for score in scores if categories is None or score.category in categories]
    table = {}
    for views in sorted({score.views for score in chosen}):
        rows = [score for score in chosen if score.views == views]
        orders = [[score for score in rows if score.order == order] for order in sorted({s.order for s in rows})]
        table[views] = {
            "rra@15": _mean([_nested(order, "rra", _mean) for order in orders]),
            "center_acc@0.1": _mean([_nested(order, "center_acc", _mean) for order in orders]),
            "chamfer": _mean([_nested(order, "chamfer", _median) for order in orders]),
            "chamfer_object": _mean([_nested(order, "chamfer_object", _median) for order in orders]),
            "scenes": float(len(rows)),
        }
    return table


def format_pose_table(tables: dict[str, dict[int, dict[str, float]]]) -> str:
    """Markdown: for each title, one line a measure and one column a number of views."""
    columns = sorted({views for table in tables.values() for views in table})
    lines = [["", *(f"N = {views}" for views in columns)], ["---", *("---:" for _ in columns)]]
    labels = {"rra@15": "R@15", "center_acc@0.1": "CC@0.1", "chamfer": "CD", "chamfer_object": "CD_Obj"}
    for title, table in tables.items():
        for name, label in labels.items():
            cells = [_cell(table.get(views, {}).get(name)) for views in columns]
            lines.append([f"{title} {label}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _nested(scores: Sequence[SceneScore], field: str, average: Callable[[Sequence[float]], float]) -> float:
    """`average` over sequences, then over categories."""
    names = sorted({score.category for score in scores})
    return average([average([getattr(s, field) for s in scores if s.category == name]) for name in names])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _median(values: Sequence[float]) -> float:
    known = sorted(value for value in values if not math.isnan(value))
    if not known:
        return math.nan
    return (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2


def _cell(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"
