"""One protocol over many sequences, fed view by view: trajectories, depth, reconstructions, relative poses.

What is kept of a sequence until it ends is what its alignment needs: its cameras, or the depth of pixels whose truth is
known, or the clouds of its few views. What is kept of a set is a few sums. Protocols: `docs/protocols.md`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import SumMetric

from restrike.geometry import (
    crop_intrinsics,
    invert_se3,
    resize_intrinsics,
    transform_points,
    unproject_depth,
)
from restrike.metrics.camera_pose import PoseAccuracy, TrajectoryError
from restrike.metrics.depth import DepthAlignment, DepthErrors
from restrike.metrics.reconstruction import ReconstructionErrors
from restrike.metrics.recurrent import aligned_clouds

VIDEO_ALIGNMENTS: tuple[DepthAlignment, ...] = ("metric", "scale", "scale_shift")
_REPORTED = ("abs_rel", "delta@1.25")
_MIN_POSES = 3  # fewer fix no similarity


class ViewAnswer(NamedTuple):
    """What a network says of a view.

    Attributes:
        camera_to_world: [3, 4].
        depth: [P, Q] z-depth over the crop that the network saw.
        points_first: [P, Q, 3], in the camera of the sequence's first view.
        crop_box: [4], that crop's (left, top, right, bottom) in pixels of the whole picture.
    """

    camera_to_world: Tensor
    depth: Tensor | None
    points_first: Tensor | None
    crop_box: Tensor


class ViewTruth(NamedTuple):
    """The truth of a view, as far as the set has it.

    Attributes:
        size: (H, W) of the whole picture.
        camera_to_world: [3, 4].
        depth: [H', W'] z-depth over the whole picture at its own resolution; ≤ 0 or not finite where unknown.
        intrinsics: [3, 3], pixels of the whole picture.
    """

    size: tuple[int, int]
    camera_to_world: Tensor | None = None
    depth: Tensor | None = None
    intrinsics: Tensor | None = None


class SequenceScore(nn.Module):
    """Scores sequences: `add` its views in order, then `finish` it."""

    needs: tuple[str, ...] = ()  # fields of `ViewAnswer` that it cannot do without

    @abstractmethod
    def add(self, said: ViewAnswer, true: ViewTruth) -> None:
        """The next view of the sequence."""

    @abstractmethod
    def finish(self) -> None:
        """The sequence is over."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Name -> value of all sequences of all ranks; every rank has to take part."""


class TrajectoryScore(SequenceScore):
    """ATE and RPE. Frames whose truth is unknown were shown, and are not compared."""

    needs = ("camera_to_world",)

    def __init__(self) -> None:
        super().__init__()
        self.metric = TrajectoryError()
        self._poses: list[tuple[Tensor, Tensor]] = []

    def add(self, said: ViewAnswer, true: ViewTruth) -> None:
        """Keep the pair of cameras."""
        if true.camera_to_world is not None:
            self._poses.append((said.camera_to_world.double(), true.camera_to_world.to(said.camera_to_world).double()))

    def finish(self) -> None:
        """Align and compare.

        Raises:
            ValueError: fewer than 3 poses are known.
        """
        if len(self._poses) < _MIN_POSES:
            raise ValueError(f"a trajectory needs {_MIN_POSES} known poses, got {len(self._poses)}")
        predicted, true = (torch.stack(side)[None] for side in zip(*self._poses, strict=True))
        self._poses = []
        self.metric.update(predicted, true)

    def compute(self) -> dict[str, Tensor]:
        """Name -> mean over sequences: "ate", "rpe_translation", "rpe_rotation"."""
        return self.metric.compute()


class RelativePoseScore(SequenceScore):
    """RRA, RTA and AUC over all pairs of a sequence, all pairs pooled: as released, and "auc@30_invariant"."""

    needs = ("camera_to_world",)

    def __init__(self) -> None:
        super().__init__()
        self.metric = PoseAccuracy(maa=(), relative="released")
        self.invariant = PoseAccuracy(rra=(), rta=(), maa=(), auc=(30,), relative="camera")
        self._poses: list[tuple[Tensor, Tensor]] = []

    def add(self, said: ViewAnswer, true: ViewTruth) -> None:
        """Keep the pair of cameras."""
        assert true.camera_to_world is not None, "the protocol's reader checks it"
        self._poses.append((said.camera_to_world.double(), true.camera_to_world.to(said.camera_to_world).double()))

    def finish(self) -> None:
        """Compare all pairs."""
        predicted, true = (invert_se3(torch.stack(side)[None]) for side in zip(*self._poses, strict=True))
        self._poses = []
        self.metric.update(predicted, true)
        self.invariant.update(predicted, true)

    def compute(self) -> dict[str, Tensor]:
        """Name -> share of pairs: "rra@5" … "auc@30", "auc@30_invariant"."""
        return self.metric.compute() | {"auc@30_invariant": self.invariant.compute()["auc@30"]}


class VideoDepthScore(SequenceScore):
    """AbsRel and δ < 1.25 after one alignment a sequence, for each kind of alignment.

    Args:
        alignments: As in `align_depth`.
        max_depth: As in `DepthErrors`.
        clip: As in `DepthErrors`.
    """

    needs = ("depth",)

    def __init__(
        self,
        alignments: Sequence[DepthAlignment] = VIDEO_ALIGNMENTS,
        max_depth: float | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        self.metrics: Any = nn.ModuleDict({name: DepthErrors(name, max_depth, clip) for name in alignments})
        self._pixels: list[tuple[Tensor, Tensor]] = []

    def add(self, said: ViewAnswer, true: ViewTruth) -> None:
        """Keep the pixels whose truth is known; on the CPU, where the most memory is."""
        predicted, known = known_depth(said, true)
        self._pixels.append((predicted.cpu(), known.cpu()))

    def finish(self) -> None:
        """Align and compare."""
        pixels, self._pixels = self._pixels, []
        predicted, true = (torch.cat(side)[None, None, None] for side in zip(*pixels, strict=True))
        for metric in self.metrics.values():
            if true.numel():
                metric.update(predicted.to(metric.device), true.to(metric.device))

    def compute(self) -> dict[str, Tensor]:
        """Name -> mean over pixels: "abs_rel_scale", "delta@1.25_scale" and so on."""
        found = {alignment: metric.compute() for alignment, metric in self.metrics.items()}
        return {f"{name}_{alignment}": values[name] for alignment, values in found.items() for name in _REPORTED}


class FrameDepthScore(SequenceScore):
    """AbsRel and δ < 1.25 of frames, each after its own ratio of medians."""

    needs = ("depth",)

    def __init__(self, max_depth: float | None = None, clip: float | None = None) -> None:
        super().__init__()
        self.metric = DepthErrors("median", max_depth, clip)

    def add(self, said: ViewAnswer, true: ViewTruth) -> None:
        """Align and compare."""
        predicted, known = (side[None, None, None] for side in known_depth(said, true))
        if known.numel():
            self.metric.update(predicted, known)

    def finish(self) -> None:
        """Nothing is left to do."""

    def compute(self) -> dict[str, Tensor]:
        """Name -> mean over pixels: "abs_rel", "delta@1.25"."""
        return {name: value for name, value in self.metric.compute().items() if name in _REPORTED}


class ReconstructionScore(SequenceScore):
    """Accuracy, completeness and normal consistency of the points of all views, as CUT3R's evaluation brings them
    together (`aligned_clouds`).

    A sequence of which too little is known, or of which the network says something that is not finite, is counted in
    "uncompared".

    Args:
        max_points: Of each cloud; more are thinned evenly. None keeps all, as published.
    """

    needs = ("points_first",)

    def __init__(self, max_points: int | None = None) -> None:
        super().__init__()
        self.max_points = max_points
        self.metric = ReconstructionErrors()
        self.uncompared = SumMetric()
        self._views: list[tuple[Tensor, Tensor, Tensor]] = []
        self._to_first: Tensor | None = None

    def add(self, said: ViewAnswer, true: ViewTruth) -> None:
        """Keep both clouds, on the network's grid, in the first camera."""
        assert true.camera_to_world is not None and said.points_first is not None
        points, mask = true_points(said, true)
        if self._to_first is None:
            self._to_first = invert_se3(true.camera_to_world.to(points))
        self._views.append((said.points_first.double(), transform_points(self._to_first, points), mask))

    def finish(self) -> None:
        """Bring together and compare."""
        predicted, true, mask = (torch.stack(side) for side in zip(*self._views, strict=True))
        self._views, self._to_first = [], None
        clouds = aligned_clouds(predicted, true, mask, self.max_points)
        if clouds is None:
            self.uncompared.update(1)
        else:
            self.metric.update(*clouds)

    def compute(self) -> dict[str, Tensor]:
        """Names of `ReconstructionErrors`, and "uncompared"."""
        return self.metric.compute() | {"uncompared": self.uncompared.compute()}


def known_depth(said: ViewAnswer, true: ViewTruth) -> tuple[Tensor, Tensor]:
    """Predicted depth, cubically resized to the truth's resolution, and true depth at its known pixels, [N] each.

    Outside of the crop that the network saw, nothing is compared.
    """
    assert said.depth is not None and true.depth is not None
    depth = true.depth.to(said.depth.device)
    left, top, right, bottom = _box(said, true)
    height, width = depth.shape
    resized = F.interpolate(
        said.depth[None, None].float(), (bottom - top, right - left), mode="bicubic", align_corners=False
    )[0, 0]
    rows, columns = slice(max(0, top), min(height, bottom)), slice(max(0, left), min(width, right))
    region = depth[rows, columns]
    predicted = resized[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    known = (region > 0) & region.isfinite()
    return predicted[known], region[known]


def true_points(said: ViewAnswer, true: ViewTruth) -> tuple[Tensor, Tensor]:
    """World points float64 [P, Q, 3] of the true depth on the network's grid (nearest), and where it is known."""
    assert true.depth is not None and true.intrinsics is not None and true.camera_to_world is not None
    assert said.points_first is not None
    grid = (said.points_first.shape[0], said.points_first.shape[1])
    left, top, right, bottom = _box(said, true)
    height, width = true.depth.shape
    edges = (max(0, -left), max(0, right - width), max(0, -top), max(0, bottom - height))
    seen = true.depth[max(0, top) : min(height, bottom), max(0, left) : min(width, right)]
    seen = F.pad(seen, edges)[None, None].double().to(said.points_first.device)
    depth = F.interpolate(seen, grid, mode="nearest")[0, 0]
    mask = (depth > 0) & depth.isfinite()
    depth = torch.where(mask, depth, 0.0)
    across, down = true.size[1] / width, true.size[0] / height  # pixels of the picture in one of the truth
    intrinsics = crop_intrinsics(true.intrinsics.to(depth), left * across, top * down)
    intrinsics = resize_intrinsics(intrinsics, grid[1] / ((right - left) * across), grid[0] / ((bottom - top) * down))
    points = unproject_depth(depth[None], intrinsics[None], true.camera_to_world.to(depth)[None])[0]
    return torch.where(mask[..., None], points, 0.0), mask


def _box(said: ViewAnswer, true: ViewTruth) -> tuple[int, int, int, int]:
    """The network's crop in whole pixels of the true depth; may reach beyond it."""
    assert true.depth is not None
    across, down = true.depth.shape[1] / true.size[1], true.depth.shape[0] / true.size[0]
    left, top, right, bottom = said.crop_box.tolist()
    return round(left * across), round(top * down), round(right * across), round(bottom * down)
