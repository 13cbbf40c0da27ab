"""Which frames of a sequence a sample takes: one function a family, each pure in its generator.

Positions count from 0 in the sequence's usable frames, in time order. Draws come in the order of each family's
release, so that its recorded choices come out of the same generator. Papers: Zhang et al. 2024 (RayDiffusion) and
DiffusionSfM 2025 for random views, CUT3R 2025 (supplement, data), VGGT 2025 (section 3.4).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from restrike.data.source import BadSampleError

Random = np.random.Generator | np.random.RandomState


class Views(NamedTuple):
    """Positions int64 [V]; `is_video` = in time order, evenly enough to be called a video."""

    positions: np.ndarray
    is_video: bool = False


class ViewSampler(ABC):
    """How a family chooses frames. A class, as a config names one of its children.

    Attributes:
        replaces_empty: asks for frames without depth to be replaced after the draw.
    """

    replaces_empty: bool

    @abstractmethod
    def items(self, num_frames: int, count: int) -> int:
        """Starts that count as separate samples of a sequence of so many frames."""

    @abstractmethod
    def draw(self, num_frames: int, start: int, count: int, random: np.random.Generator) -> Views:
        """Choose `count` views."""


@dataclass(frozen=True)
class RandomViews(ViewSampler):
    """Views of the whole sequence, in no order.

    Attributes:
        repeat: with replacement always (VGGT), or only where a sequence has fewer frames than views (DiffusionSfM).
        nearby: each view within `nearby` * count frames of the first, with replacement (VGGT's video sets); 0 = off.
    """

    repeat: bool = False
    nearby: int = 0
    replaces_empty: ClassVar[bool] = False  # type: ignore[misc]

    def items(self, num_frames: int, count: int) -> int:
        """One: the sequence."""
        return 1

    def draw(self, num_frames: int, start: int, count: int, random: Random) -> Views:
        if self.nearby:
            first = int(random.choice(num_frames))
            return Views(nearby_positions(num_frames, first, count, self.nearby * count, random))
        repeat = self.repeat or num_frames < count
        return Views(np.asarray(random.choice(num_frames, count, replace=repeat), dtype=np.int64))


def nearby_positions(num_frames: int, first: int, count: int, reach: int, random: Random) -> np.ndarray:
    """`first`, then count - 1 draws with replacement from [first - reach, first + reach) inside the sequence."""
    around = np.arange(max(0, first - reach), min(num_frames, first + reach))
    return np.append(np.int64(first), random.choice(around, size=count - 1, replace=True))


@dataclass(frozen=True)
class WindowViews(ViewSampler):
    """CUT3R's choice: steps of varying length from a start frame, as an ordered video or as a shuffled collection.

    Attributes:
        min_interval, max_interval: frames between successive views (CO3D: 1 to 25).
        video_prob: of an ordered video.
        fix_interval_prob: of one constant interval in a video.
        block_shuffle: shuffle a collection in blocks of so many views; None = whole.
        allow_repeat: let short sequences start a sample too, whose views then repeat (CUT3R's later stages).
        replaces_empty: put the next frame with depth in place of one without (`replace_empty`).
        reverse: hand views over last first, as the release does, so that its videos run backwards.
    """

    min_interval: int = 1
    max_interval: int = 25
    video_prob: float = 0.5
    fix_interval_prob: float = 0.5
    block_shuffle: int | None = None
    allow_repeat: bool = False
    replaces_empty: bool = True
    reverse: bool = True

    def items(self, num_frames: int, count: int) -> int:
        """Start frames: all but the last cut - 1; a shorter sequence still gives some (a negative slice there)."""
        cut = max(count // 3, 3) if self.allow_repeat else count
        return len(range(num_frames)[: num_frames - cut + 1])

    def draw(self, num_frames: int, start: int, count: int, random: np.random.Generator) -> Views:
        views = self.in_order(num_frames, start, count, random)
        return Views(views.positions[::-1].copy(), views.is_video) if self.reverse else views

    def in_order(self, num_frames: int, start: int, count: int, random: np.random.Generator) -> Views:
        """Before `reverse`."""
        left = num_frames - 1 - start
        if left < count - 1:
            return self._repeated(num_frames, start, count, random)
        if left == count - 1:
            return Views(np.arange(start, num_frames), True)
        cap = min(self.max_interval, 2 * left // (count - 1))
        steps = random.integers(self.min_interval, max(cap, self.min_interval) + 1, size=count - 1)
        is_video = bool(random.random() < self.video_prob)
        if is_video and random.random() < self.fix_interval_prob:
            constant = int(random.integers(1, min(left // (count - 1), cap) + 1))
            steps = np.full(count - 1, constant)
        positions = start + np.concatenate([[0], np.cumsum(steps)])
        positions = positions[positions < num_frames]
        if lost := count - len(positions):
            unused = np.setdiff1d(np.arange(start, num_frames), positions)
            positions = np.concatenate([positions, random.choice(unused, lost, replace=False)])
        return Views(np.sort(positions) if is_video else self._shuffled(positions, random), is_video)

    def _repeated(self, num_frames: int, start: int, count: int, random: np.random.Generator) -> Views:
        """Too few frames behind the start: fewer unique ones from an earlier start, some of them twice."""
        unique = num_frames - 1 - start
        if unique < 2:  # a start that only a negative slice gives; the release has no rule for it
            return Views(np.sort(random.choice(num_frames, count, replace=num_frames < count)), False)
        first = int(random.integers(0, start + 1))
        cap = max(1, min(self.max_interval, (num_frames - 1 - first) // (unique - 1)))
        steps = random.integers(min(self.min_interval, cap), cap + 1, size=unique - 1)
        revisit, video, fixed = random.random(), random.random(), random.random()
        is_video = video < self.video_prob
        if is_video and fixed < self.fix_interval_prob:
            steps = np.full(unique - 1, int(random.integers(1, cap + 1)))
        positions = first + np.concatenate([[0], np.cumsum(steps)])
        positions = positions[positions < num_frames]
        if revisit < 0.5 or self.video_prob == 1.0:
            ordered = positions if is_video else self._shuffled(positions, random)
            return Views(np.resize(ordered, count), False)
        repeated = random.choice(positions, count, replace=True)
        return Views(repeated if revisit < 0.9 else np.sort(repeated), False)

    def _shuffled(self, positions: np.ndarray, random: np.random.Generator) -> np.ndarray:
        size = self.block_shuffle or len(positions)
        return np.concatenate([random.permutation(positions[k : k + size]) for k in range(0, len(positions), size)])


def replace_empty(positions: np.ndarray, usable: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, int]:
    """CUT3R's mend of views without any depth: each becomes the next usable frame in a random direction, wrapping.

    Args:
        positions: int64 [V].
        usable: bool [num_frames].

    Returns:
        Positions, and how many views from the front may still be called a video.

    Raises:
        BadSampleError: no usable frame at all.
    """
    if not usable.any():
        raise BadSampleError("no frame of this sequence has depth")
    mended, video_until = positions.copy(), len(positions)
    for view, position in enumerate(positions):
        if not usable[position]:
            video_until = min(video_until, view)
            step = 2 * int(random.choice(2)) - 1
            while not usable[position]:
                position = (position + step) % len(usable)
            mended[view] = position
    return mended, video_until
