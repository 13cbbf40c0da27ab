"""The epoch plan: exact for any sizes, equal for any number of ranks, local, and frozen."""

from __future__ import annotations

import copy
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restrike.data.plan import EpochPlan, Position, _sort_within_runs, evaluation_ids, nearest_position

CONFIGURATIONS = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),  # shard sizes, often fewer shards than ranks or lanes
    st.integers(1, 5),  # ranks
    st.integers(1, 6),  # batch per rank
    st.integers(1, 70),  # lanes
    st.integers(0, 30),  # window
    st.integers(0, 3),  # epoch
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(CONFIGURATIONS)
def test_no_sample_comes_twice_and_less_than_one_global_batch_is_dropped(configuration):
    sizes, ranks, batch, lanes, window, epoch = configuration
    if sum(sizes) < ranks * batch:
        return
    plan = EpochPlan(np.array(sizes), ranks * batch, seed=7, window=window, lanes=lanes)
    ids = np.concatenate([plan.batch(epoch, step, rank, ranks) for step in range(plan.steps) for rank in range(ranks)])
    assert len(ids) == plan.steps * ranks * batch
    assert sum(sizes) - len(ids) < ranks * batch
    assert len(np.unique(ids)) == len(ids)
    assert ids.min() >= 0
    assert ids.max() < sum(sizes)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(CONFIGURATIONS)
def test_a_plan_asked_for_any_step_first_gives_the_same(configuration):
    sizes, ranks, batch, lanes, window, epoch = configuration
    if sum(sizes) < ranks * batch:
        return
    plans = [EpochPlan(np.array(sizes), ranks * batch, seed=7, window=window, lanes=lanes) for _ in range(2)]
    forward = [plans[0].batch(epoch, step, 0, ranks) for step in range(plans[0].steps)]
    plans[1].batch(epoch + 1, 0, 0, ranks)
    backward = [plans[1].batch(epoch, step, 0, ranks) for step in reversed(range(plans[1].steps))]
    assert all(np.array_equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 12])
def test_another_number_of_ranks_sees_the_same_global_batches(ranks):
    plan = EpochPlan(np.array([40, 3, 25, 32]), 12, seed=1)
    for step in range(plan.steps):
        parts = [plan.batch(4, step, rank, ranks) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(parts), plan.batch(4, step))


def test_epochs_and_seeds_differ():
    orders = [EpochPlan(np.array([50, 50]), 10, seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_all_samples_get_their_turn_over_the_epochs():
    plan = EpochPlan(np.array([7, 6]), 8, seed=0)  # drops 5 of 13 each epoch
    seen = np.unique(np.concatenate([plan.order(epoch) for epoch in range(12)]))
    assert len(seen) == 13


def test_one_shard_and_no_shards_are_shuffled_uniformly():
    for sizes in (np.array([64]), np.ones(64, dtype=int)):
        plan = EpochPlan(sizes, 8, seed=0)
        first = np.array([plan.batch(epoch, 0) for epoch in range(400)])
        counts = np.bincount(first.ravel(), minlength=64)  # each expected 50 times
        assert counts.min() > 20
        assert counts.max() < 90


def test_a_rank_reads_its_own_few_shards_at_a_time():
    plan = EpochPlan(np.full(1024, 10), 128, seed=0, window=4 * 10, lanes=64)
    for rank in range(16):
        ids = np.concatenate([plan.batch(0, step, rank, 16) for step in range(20)])
        assert len(np.unique(ids // 10)) <= 4 * (4 + 1)  # 4 lanes, windows of 4 shards and one cut at an edge


def test_ranks_with_whole_lanes_share_few_shards():
    plan = EpochPlan(np.full(256, 10), 128, seed=0, window=40, lanes=64)
    shards = [
        set((np.concatenate([plan.batch(0, step, rank, 4) for step in range(plan.steps)]) // 10).tolist())
        for rank in range(4)
    ]
    assert sum(len(own) for own in shards) <= 256 + 3


def test_the_order_is_frozen():
    """A change here changes which images every resumed run sees: it needs a new major version, and a note."""
    order = EpochPlan(np.array([100, 20, 57]), 12, seed=3, window=9, lanes=8).order(2)
    assert zlib.crc32(order.astype("<i8").tobytes()) == 1895085826


def test_a_set_smaller_than_a_batch_says_which_options_to_change():
    with pytest.raises(ValueError, match=r"has 5 images.*global batch of 6; lower data\.batch_size_per_device"):
        EpochPlan(np.array([5]), 6, seed=0)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide among 5 ranks"):
        EpochPlan(np.array([50]), 12, seed=0).batch(0, 0, 0, 5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 8))
def test_evaluation_sees_each_sample_once_in_equal_batches(samples, ranks, batch):
    per_rank = [evaluation_ids(samples, batch, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    assert all(len(ids) == batch for batches in per_rank for ids in batches)
    ids = np.concatenate([ids for batches in per_rank for ids in batches])
    assert sorted(ids[ids >= 0].tolist()) == list(range(samples))
    assert len(per_rank[0]) == -(-(-(-samples // ranks)) // batch)


def test_another_global_batch_goes_on_at_the_nearest_step():
    plan = EpochPlan(np.array([100]), 8, seed=0)  # 12 steps
    assert nearest_position(5 * 10, 3, plan) == Position(3, 6)
    assert nearest_position(98, 3, plan) == Position(4, 0)
    assert nearest_position(0, 3, plan) == Position(3, 0)


class _Draws:
    """In place of a generator: draws with many ties."""

    def random(self, size):
        return np.random.default_rng(0).integers(0, 4, size) / 4


@pytest.mark.parametrize("random", [np.random.default_rng(0), _Draws()], ids=["usual", "ties"])
@pytest.mark.parametrize("lengths", [[1000] * 100, [1000] * 99 + [167], [0, 7, 0, 5, 6], [1, 9000, 3], [1] * 500, []])
def test_sorting_within_runs_is_a_stable_sort_by_run_and_draw(random, lengths):
    lengths = np.array(lengths, dtype=np.int64)
    draws = copy.deepcopy(random).random(int(lengths.sum()))
    runs = np.repeat(np.arange(len(lengths)), lengths)
    assert np.array_equal(_sort_within_runs(lengths, random), np.lexsort((draws, runs)))
