"""Which scenes, how many views and what shape each step has: pure functions of (seed, epoch, step), equal on all ranks.

The view count and the aspect of a step are the same on every rank, so that ranks do equal work; VGGT's release draws
the count on each rank by itself, and ranks wait for the slowest. Scenes are dealt to global slots and a rank takes its
own, so another number of ranks with the same global batch sees the same batches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from restrike.data.plan import Position
from restrike.data.randomness import Purpose, stream


class BatchShape(NamedTuple):
    """A step's views per scene, image size (H, W), scenes per rank, and how many views are kept after normalisation."""

    views: int
    size: tuple[int, int]
    scenes: int
    kept_views: int


class ShapePolicy(ABC):
    """How a family draws the shape of a step. A class, as a config names one of its children.

    Attributes:
        scenes: Of a rank's step with the most views.
    """

    scenes: int

    @property
    @abstractmethod
    def max_views(self) -> int:
        """Views of a scene, at most."""

    @abstractmethod
    def draw(self, random: Any) -> BatchShape:
        """The shape of one step."""


@dataclass(frozen=True)
class FixedShape(ShapePolicy):
    """The same shape always; DiffusionSfM loads all views, normalises, then keeps uniform{min_views..views} of them."""

    views: int
    size: tuple[int, int]
    scenes: int
    min_views: int | None = None

    def __post_init__(self) -> None:
        if self.min_views is not None and not 1 <= self.min_views <= self.views:
            raise ValueError(f"shape.min_views is {self.min_views}, expected 1 to {self.views} (shape.views), or null")

    @property
    def max_views(self) -> int:
        return self.views

    def draw(self, random: Any) -> BatchShape:
        least = self.views if self.min_views is None else self.min_views
        return BatchShape(self.views, self.size, self.scenes, int(random.integers(least, self.views + 1)))


@dataclass(frozen=True)
class DynamicShape(ShapePolicy):
    """VGGT's: count uniform in [min_views, views], then aspect uniform in `aspects`, and as many scenes as fit.

    Attributes:
        views, min_views: bounds of the count, inclusive.
        width: pixels; height = width * aspect, down to a multiple of `patch`.
        aspects: height / width, rounded to 2 decimals.
        max_img_per_gpu: views of all scenes of a rank together; one scene at least.
        patch: the model's.
    """

    views: int
    width: int
    min_views: int = 2
    aspects: tuple[float, float] = (0.33, 1.0)
    max_img_per_gpu: int = 48
    patch: int = 14

    @property
    def max_views(self) -> int:
        return self.views

    @property
    def scenes(self) -> int:  # type: ignore[override]
        return self._scenes(self.views)

    def draw(self, random: Any) -> BatchShape:
        views = draw_count(random, self.min_views, self.views)
        height = aspect_height(self.width, draw_aspect(random, *self.aspects), self.patch)
        return BatchShape(views, (height, self.width), self._scenes(views), views)

    def _scenes(self, views: int) -> int:
        return max(1, self.max_img_per_gpu // views)


def draw_count(random: Any, least: int, most: int) -> int:
    """Uniform in [least, most], drawn as VGGT's release does (`choice` with equal weights)."""
    counts = np.arange(least, most + 1)
    return int(random.choice(counts, p=np.full(len(counts), 1 / len(counts))))


def draw_aspect(random: Any, low: float, high: float) -> float:
    """Height / width, uniform and rounded to 2 decimals."""
    return round(low + (high - low) * float(random.random()), 2)


def aspect_height(width: int, aspect: float, patch: int) -> int:
    """⌊width · aspect⌋ down to a multiple of the patch; one patch at least."""
    return max(patch, math.floor(width * aspect) // patch * patch)


@dataclass(frozen=True)
class PooledShape(ShapePolicy):
    """CUT3R's: one of several resolutions a step, the first half of them twice as likely, and perhaps a view count.

    Attributes:
        views: the largest count.
        sizes: (H, W); all with about the same area.
        scenes: per rank; with `vary_views` the count varies, not the scenes.
        vary_views: count uniform in [4, views].
    """

    views: int
    sizes: tuple[tuple[int, int], ...]
    scenes: int
    vary_views: bool = False

    @property
    def max_views(self) -> int:
        return self.views

    def draw(self, random: Any) -> BatchShape:
        size = self.sizes[int(random.choice(len(self.sizes), p=pool_weights(len(self.sizes))))]
        views = int(random.integers(min(4, self.views), self.views + 1)) if self.vary_views else self.views
        return BatchShape(views, size, self.scenes, views)


def pool_weights(count: int) -> np.ndarray:
    """The first half of a resolution list counts double (one resolution: 1)."""
    weights = np.ones(count)
    weights[: count // 2] = 2
    return weights / weights.sum()


def tiled_order(num_items: int, length: int, seed: int) -> np.ndarray:
    """CUT3R's "length @ dataset": one permutation of the items, repeated up to the length; int64 [length]."""
    return np.resize(np.random.default_rng(seed).permutation(num_items), length)


def pooled_batches(
    length: int, batch: int, pools: int, views: int, vary_views: bool, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CUT3R's epoch in one draw, as the release has it: items [n, batch], resolution [n], views [n] of n batches."""
    random = np.random.default_rng(seed)
    items = np.arange(length)
    random.shuffle(items)
    count = length // batch
    pool = random.choice(pools, size=count, p=pool_weights(pools))
    number = random.integers(4, views + 1, size=count) if vary_views else np.full(count, views)
    return items[: count * batch].reshape(count, batch), pool, number


Order = Literal["permuted", "independent"]


class ScenePlan:
    """Scenes of every step of a training run.

    Args:
        num_items: samples to draw from (sequences, or start frames).
        policy: shape of a step.
        seed: of everything.
        world_size: ranks.
        epoch_length: samples per epoch; None = num_items. "permuted" repeats or cuts a permutation to it.
        order: "permuted": each item equally often; "independent": each sample drawn anew, with replacement (VGGT).
        steps: of an epoch; needed for "independent" orders with a varying number of scenes.

    Raises:
        ValueError: no item, an epoch shorter than a step, or dealing to steps of a varying number of scenes.
    """

    def __init__(
        self,
        num_items: int,
        policy: ShapePolicy,
        seed: int,
        world_size: int = 1,
        epoch_length: int | None = None,
        order: Order = "permuted",
        steps: int | None = None,
    ) -> None:
        if num_items < 1:
            raise ValueError("the filters of the data leave no sequence; loosen categories, subsets or min_quality")
        self.num_items, self.policy, self.seed, self.world_size, self.order = (
            num_items, policy, seed, world_size, order,
        )  # fmt: skip
        self.epoch_length = epoch_length or num_items
        self.global_batch_size = self.shape(Position(0, 0)).scenes * world_size  # of a first step, where it varies
        if order == "independent":
            if steps is None:
                raise ValueError("data.steps_per_epoch: an order with replacement has no end; say how long an epoch is")
            self.steps = steps
        else:
            if isinstance(policy, DynamicShape):
                raise ValueError("data.order: a DynamicShape varies the number of scenes; give order: independent")
            slots = self.global_batch_size
            self.steps = self.epoch_length // slots
            if self.steps == 0:
                raise ValueError(
                    f"the training split has {self.epoch_length} samples, fewer than a global batch of {slots}; lower "
                    "data.batch_size_per_device or the number of devices, or raise data.epoch_length"
                )
        self._order: tuple[int, np.ndarray] | None = None

    def shape(self, position: Position) -> BatchShape:
        """The step's shape, the same on all ranks."""
        return self.policy.draw(stream(self.seed, Purpose.SHAPE, *position))

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Items of one rank's step, int64 [scenes]."""
        scenes = self.shape(Position(epoch, step)).scenes
        slots = np.arange(rank * scenes, (rank + 1) * scenes)
        if self.order == "permuted":
            return self._permutation(epoch)[(step * scenes * world_size + slots) % self.epoch_length]
        draws = stream(self.seed, Purpose.SCENES, epoch, step).integers(self.num_items, size=scenes * world_size)
        return draws[slots]

    def after(self, position: Position) -> Position:
        """The next step, perhaps the first of the next epoch."""
        epoch, step = position
        return Position(epoch, step + 1) if step + 1 < self.steps else Position(epoch + 1, 0)

    def _permutation(self, epoch: int) -> np.ndarray:
        """Tiled to the epoch's length. Where items repeat, every stretch of num_items holds each once."""
        if self._order is None or self._order[0] != epoch:
            random = stream(self.seed, Purpose.SCENES, epoch)
            rounds = -(-self.epoch_length // self.num_items)
            parts = [np.argsort(random.random(self.num_items), kind="stable") for _ in range(rounds)]
            self._order = (epoch, np.concatenate(parts)[: self.epoch_length])
        return self._order[1]
