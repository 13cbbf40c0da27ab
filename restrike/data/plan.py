"""Which samples each step of each rank sees: a pure function of (seed, epoch, step, global batch).

Shards are permuted, the samples of each are permuted within it, and all are laid end to end. This order is cut into
`lanes` consecutive segments of (nearly) equal length; samples are then shuffled inside windows of a segment. A global
batch takes an equal share from every lane, in lane order, and rank r of W gets the r-th of W equal slices.

So the order knows nothing of ranks, nodes or workers: with the same global batch another number of ranks sees the
same global batches. And it is local: while lanes ≥ ranks, a rank reads its own few lanes only, from a window of a few
shards each, so that a node fetches its share of a remote set and not all of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from restrike.data.randomness import Purpose, stream

DEFAULT_LANES = 64


class Position(NamedTuple):
    """Where a run stands: the next batch to hand over is number `step` of `epoch`."""

    epoch: int
    step: int


START = Position(0, 0)


class EpochPlan:
    """Order of a training split.

    Args:
        shard_sizes: samples per shard; all ones for a set without shards, which gives a plain uniform permutation.
        global_batch_size: samples per step over all ranks.
        seed: of the order.
        window: samples of a lane that are shuffled together; 0 = the whole lane.
        lanes: part of the order: another number gives another order.

    Raises:
        ValueError: fewer samples than one global batch.
    """

    def __init__(
        self,
        shard_sizes: np.ndarray,
        global_batch_size: int,
        seed: int,
        window: int = 0,
        lanes: int = DEFAULT_LANES,
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.global_batch_size, self.seed, self.window = global_batch_size, seed, window
        if self.num_samples < global_batch_size:
            raise ValueError(
                f"the training split has {self.num_samples} images, fewer than one global batch of "
                f"{global_batch_size}; lower data.batch_size_per_device or the number of devices"
            )
        self.steps = self.num_samples // global_batch_size
        cuts = np.arange(lanes + 1) * global_batch_size // lanes  # slots of a global batch at which lanes begin
        share = np.diff(cuts)
        slot_lane = np.repeat(np.arange(lanes), share)
        self._lane_starts = cuts * self.steps
        self._slot_starts = self._lane_starts[slot_lane] + np.arange(global_batch_size) - cuts[slot_lane]
        self._slot_strides = share[slot_lane]
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Global sample numbers, int64 [global_batch_size / world_size], of one rank's step.

        Raises:
            ValueError: the global batch does not divide among the ranks.
        """
        if self.global_batch_size % world_size:
            raise ValueError(f"a global batch of {self.global_batch_size} does not divide among {world_size} ranks")
        assert 0 <= step < self.steps, f"step {step} of {self.steps}"
        size = self.global_batch_size // world_size
        slots = slice(rank * size, (rank + 1) * size)
        return self.order(epoch)[self._slot_starts[slots] + step * self._slot_strides[slots]]

    def after(self, position: Position) -> Position:
        """The next step, perhaps the first of the next epoch."""
        epoch, step = position
        return Position(epoch, step + 1) if step + 1 < self.steps else Position(epoch + 1, 0)

    def order(self, epoch: int) -> np.ndarray:
        """All samples that the epoch uses, int64 [steps * global_batch_size], lane after lane. The last one is kept."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._shuffle(epoch))
        return self._order[1]

    def _shuffle(self, epoch: int) -> np.ndarray:
        random = stream(self.seed, Purpose.SHARD_ORDER, epoch)
        by_draw = np.argsort(random.random(len(self.shard_sizes)), kind="stable")
        sizes = self.shard_sizes
        within = _sort_within_runs(sizes, random)
        if len(sizes) == self.num_samples:
            order = by_draw
        else:  # shard after shard
            starts = np.cumsum(sizes) - sizes
            order = within[np.repeat(starts[by_draw], sizes[by_draw]) + _count_up(sizes[by_draw])]
        order = order[: self.steps * self.global_batch_size]
        if self.window == 0 and len(sizes) == self.num_samples:
            return order  # already a uniform permutation
        lanes = np.diff(self._lane_starts)
        window = self.window or max(1, int(lanes.max()))
        whole, rest = lanes // window, lanes % window
        runs = np.column_stack([whole, rest > 0]).ravel()  # how many whole windows of a lane, and whether a part
        lengths = np.repeat(np.column_stack([np.full_like(rest, window), rest]).ravel(), runs)
        return order[_sort_within_runs(lengths, stream(self.seed, Purpose.WINDOW_SHUFFLE, epoch))]


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """0, 1, … of every run: [0, 1, 2, 0, 1] for lengths 3 and 2."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _sort_within_runs(lengths: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Indices of all runs, laid end to end, at random within each. One draw per element: stable across numpy versions.

    Equal to a sort by (run, draw). Runs of about one length are rows of a table: many short sorts, which stay in cache,
    take a third of the time of one long one.
    """
    total, longest = int(lengths.sum()), int(lengths.max(initial=0))
    draws = random.random(total)
    if longest <= 1:
        return np.arange(total)
    if longest * len(lengths) > 2 * total:
        return np.lexsort((draws, np.repeat(np.arange(len(lengths)), lengths)))
    if longest * len(lengths) == total:
        table = draws.reshape(-1, longest)
    else:
        table = np.full((len(lengths), longest), np.inf)  # draws are below 1, so padding comes last
        table[np.arange(longest) < lengths[:, None]] = draws
    columns = np.argsort(table, axis=1)
    ordered = np.take_along_axis(table, columns, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & np.isfinite(ordered[:, 1:])).any():
        columns = np.argsort(table, axis=1, kind="stable")
    places = columns + (np.cumsum(lengths) - lengths)[:, None]
    return places.ravel() if places.size == total else places[np.arange(longest) < lengths[:, None]]


def evaluation_ids(num_samples: int, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """Batches of one rank, each sample exactly once over all ranks.

    Rank r takes samples [r N / W, (r + 1) N / W). Every rank gets the same number of batches of the same size; rows
    past a rank's share are -1 (padding), also whole batches of it where N < W.

    Returns:
        int64 [batch_size] arrays.
    """
    own = np.arange(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)
    batches = math.ceil(math.ceil(num_samples / world_size) / batch_size)
    padded = np.full(batches * batch_size, -1, dtype=np.int64)
    padded[: len(own)] = own
    return list(padded.reshape(batches, batch_size))


def nearest_position(consumed: int, epoch: int, plan: EpochPlan) -> Position:
    """Where to go on in `epoch` after `consumed` of its samples were seen under another global batch."""
    step = round(consumed / plan.global_batch_size)
    return Position(epoch, step) if step < plan.steps else Position(epoch + 1, 0)
