"""Choices of views, shapes and scenes: bounds, balance, and one plan for all ranks."""

from collections import Counter

import numpy as np
import pytest

from restrike.data.multiview_plan import DynamicShape, FixedShape, PooledShape, ScenePlan, pool_weights
from restrike.data.plan import Position
from restrike.data.source import BadSampleError
from restrike.data.views import RandomViews, WindowViews, replace_empty


@pytest.mark.parametrize(("frames", "count"), [(40, 4), (9, 8), (8, 8), (6, 16), (3, 4), (2, 4), (1, 4)])
def test_windows_give_so_many_views_inside_the_sequence(frames: int, count: int) -> None:
    for repeat in (False, True):
        sampler = WindowViews(allow_repeat=repeat)
        for start in range(sampler.items(frames, count)):
            views = sampler.draw(frames, start, count, np.random.default_rng(start))
            assert views.positions.shape == (count,)
            assert views.positions.min() >= 0 and views.positions.max() < frames


def test_windows_are_videos_half_of_the_time_and_run_backwards() -> None:
    random = np.random.default_rng(0)
    drawn = [WindowViews().draw(200, 10, 6, random) for _ in range(400)]
    videos = [views for views in drawn if views.is_video]
    assert 160 < len(videos) < 240
    assert all((np.diff(views.positions) < 0).all() for views in videos)
    constant = [views for views in videos if len(set(np.diff(views.positions).tolist())) == 1]
    assert 0.35 < len(constant) / len(videos) < 0.65
    gaps = np.concatenate([-np.diff(np.sort(views.positions)[::-1]) for views in drawn])
    assert gaps.min() >= 1


def test_starts_leave_room_for_the_views() -> None:
    assert WindowViews().items(20, 4) == 17
    assert WindowViews().items(2, 4) == 1, "the release's negative slice"
    assert WindowViews(allow_repeat=True).items(20, 16) == 16
    assert RandomViews().items(20, 4) == 1


def test_nearby_views_stay_near() -> None:
    positions = RandomViews(nearby=2).draw(1000, 0, 5, np.random.default_rng(3)).positions
    assert np.abs(positions - positions[0]).max() <= 10


def test_frames_without_depth_are_replaced_by_their_neighbours() -> None:
    usable = np.array([True, False, False, True, True, False])
    mended, video_until = replace_empty(np.array([0, 2, 4, 5]), usable, np.random.default_rng(0))
    assert usable[mended].all() and mended[0] == 0 and mended[1] in (0, 3) and mended[2] == 4
    assert video_until == 1
    with pytest.raises(ValueError, match="no frame"):
        replace_empty(np.array([0]), np.zeros(3, bool), np.random.default_rng(0))


def test_dynamic_shapes_keep_the_image_budget_on_every_rank_alike() -> None:
    policy = DynamicShape(views=24, width=518)
    plans = [ScenePlan(100, policy, 42, world, order="independent", steps=300) for world in (1, 8)]
    for step in range(300):
        shape = plans[0].shape(Position(2, step))
        assert shape == plans[1].shape(Position(2, step))
        assert 2 <= shape.views <= 24 and shape.scenes == 48 // shape.views
        height, width = shape.size
        assert width == 518 and height % 14 == 0 and 168 <= height <= 518
    counts = Counter(plans[0].shape(Position(0, step)).views for step in range(300))
    assert len(counts) == 23
    with pytest.raises(ValueError, match="order: independent"):
        ScenePlan(100, policy, 0)


def test_pooled_shapes_prefer_the_first_half_of_the_resolutions() -> None:
    np.testing.assert_allclose(pool_weights(4), [1 / 3, 1 / 3, 1 / 6, 1 / 6])
    policy = PooledShape(16, ((512, 384), (512, 336), (384, 512), (336, 512)), 2, vary_views=True)
    plan = ScenePlan(50, policy, 0)
    shapes = [plan.shape(Position(0, step)) for step in range(400)]
    assert 0.5 < np.mean([shape.size[0] == 512 for shape in shapes]) < 0.8
    assert {shape.views for shape in shapes} == set(range(4, 17))


@pytest.mark.parametrize(("items", "length", "scenes", "world"), [(17, None, 2, 2), (5, 23, 3, 1), (40, 12, 2, 3)])
def test_an_epoch_deals_every_item_equally_often(items: int, length: int | None, scenes: int, world: int) -> None:
    plan = ScenePlan(items, FixedShape(2, (8, 8), scenes), 3, world, length)
    drawn = np.concatenate([plan.batch(1, step, r, world) for step in range(plan.steps) for r in range(world)])
    assert len(drawn) == (length or items) // (scenes * world) * scenes * world
    counts = np.bincount(drawn, minlength=items)
    assert counts.max() - counts.min() <= 1
    again = ScenePlan(items, FixedShape(2, (8, 8), scenes), 3, world, length)
    np.testing.assert_array_equal(plan.batch(1, 0, 0, world), again.batch(1, 0, 0, world))


@pytest.mark.parametrize("order", ["permuted", "independent"])
def test_other_ranks_see_the_same_global_batches(order: str) -> None:
    one = ScenePlan(30, FixedShape(2, (8, 8), 4), 1, 1, order=order, steps=5)  # type: ignore[arg-type]
    four = ScenePlan(30, FixedShape(2, (8, 8), 1), 1, 4, order=order, steps=5)  # type: ignore[arg-type]
    for step in range(5):
        got = np.concatenate([four.batch(3, step, rank, 4) for rank in range(4)])
        np.testing.assert_array_equal(got, one.batch(3, step))


def test_impossible_plans_are_refused_with_the_setting() -> None:
    with pytest.raises(ValueError, match="leave no sequence"):
        ScenePlan(0, FixedShape(2, (8, 8), 1), 0)
    with pytest.raises(ValueError, match="batch_size_per_device"):
        ScenePlan(3, FixedShape(2, (8, 8), 4), 0)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        ScenePlan(3, FixedShape(2, (8, 8), 1), 0, order="independent")


def test_a_sequence_of_empty_depth_is_a_bad_sample() -> None:
    with pytest.raises(BadSampleError):
        replace_empty(np.array([0, 1]), np.zeros(2, bool), np.random.default_rng(0))
