"""A few shapes stand for the mean step, and the largest for memory."""

from __future__ import annotations

import numpy as np
import pytest

from restrike.data.multiview_plan import BatchShape, DynamicShape, FixedShape, PooledShape
from restrike.plan.shapes import largest_shape, mean_scene, mean_scenes, pixels, typical_shapes

VGGT = DynamicShape(views=24, min_views=2, width=518)
CUT3R = PooledShape(64, ((384, 512), (144, 512), (512, 256)), scenes=4, vary_views=True)
RAYS = FixedShape(8, (224, 224), scenes=8, min_views=2)


@pytest.mark.parametrize("policy", [VGGT, CUT3R, RAYS])
def test_the_largest_shape_has_as_many_pixels_as_any_step(policy):
    random = np.random.default_rng(1)
    assert pixels(largest_shape(policy)) >= max(pixels(policy.draw(random)) for _ in range(500))


def test_the_largest_shape_has_the_most_views():
    assert largest_shape(VGGT) == BatchShape(24, (518, 518), 2, 24)
    assert largest_shape(CUT3R) == BatchShape(64, (384, 512), 4, 64)
    assert largest_shape(RAYS) == BatchShape(8, (224, 224), 8, 8)


@pytest.mark.parametrize("policy", [VGGT, CUT3R, RAYS])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_typical_shapes_have_the_mean_pixels_and_views_of_the_steps(policy, count):
    random = np.random.default_rng(2)
    drawn = [policy.draw(random) for _ in range(4000)]
    found = typical_shapes(policy, count)
    assert len(found) == count
    assert np.mean([pixels(s) for s in found]) == pytest.approx(np.mean([pixels(s) for s in drawn]), rel=0.06)
    assert np.mean([s.kept_views for s in found]) == pytest.approx(np.mean([s.kept_views for s in drawn]), rel=0.2)


def test_one_shape_stands_for_steps_that_are_all_alike():
    assert typical_shapes(FixedShape(4, (48, 48), scenes=2), 3) == [BatchShape(4, (48, 48), 2, 4)]


def test_scenes_are_counted_in_the_mean_and_as_the_loader_makes_them():
    assert mean_scenes(VGGT) == pytest.approx(np.mean([48 // n for n in range(2, 25)]), rel=0.05)
    assert mean_scene(RAYS) == (8, 8 * 224 * 224)  # all eight are loaded, whichever are kept
