"""Which batches stand for a recipe whose steps differ in views and size: the largest, for memory, and a few typical
ones, for time."""

from __future__ import annotations

import numpy as np

from restrike.data.multiview_plan import BatchShape, DynamicShape, PooledShape, ShapePolicy, aspect_height

_DRAWN = 4096


def pixels(shape: BatchShape) -> int:
    """Of all images of a rank's step that the network sees."""
    return shape.scenes * shape.kept_views * shape.size[0] * shape.size[1]


def largest_shape(policy: ShapePolicy) -> BatchShape:
    """The most pixels that a step can have; of those with equally many, the most views a scene."""
    views, drawn = policy.max_views, policy.draw(np.random.default_rng(0))
    if isinstance(policy, DynamicShape):
        size = aspect_height(policy.width, policy.aspects[1], policy.patch), policy.width
        counts = range(policy.min_views, views + 1)
        shapes = [BatchShape(n, size, max(1, policy.max_img_per_gpu // n), n) for n in counts]
    elif isinstance(policy, PooledShape):
        shapes = [BatchShape(views, size, policy.scenes, views) for size in policy.sizes]
    else:
        shapes = [drawn._replace(views=views, kept_views=views)]
    return max(shapes, key=lambda shape: (pixels(shape), shape.kept_views))


def typical_shapes(policy: ShapePolicy, count: int) -> list[BatchShape]:
    """At most `count` shapes whose mean is the recipe's: drawn steps, sorted by pixels and cut into equal parts, and of
    each part the one that is nearest to its mean in pixels and in views."""
    drawn = sorted(_drawn(policy), key=lambda shape: (pixels(shape), shape.kept_views))
    found = []
    for rows in np.array_split(np.arange(len(drawn)), count if drawn[0] != drawn[-1] else 1):
        features = np.array([(pixels(drawn[row]), drawn[row].kept_views) for row in rows], dtype=float)
        mean = features.mean(axis=0)
        found.append(drawn[rows[np.argmin((np.abs(features / mean - 1) * (1.0, 0.1)).sum(axis=1))]])
    return found


def mean_scenes(policy: ShapePolicy) -> float:
    """Scenes of a rank's step, in the mean."""
    return float(np.mean([shape.scenes for shape in _drawn(policy)]))


def mean_scene(policy: ShapePolicy) -> tuple[float, float]:
    """(views, pixels of all of them) of a scene that the loader makes, in the mean over scenes."""
    drawn = _drawn(policy)
    scenes = sum(shape.scenes for shape in drawn)
    views = sum(shape.scenes * shape.views for shape in drawn)
    area = sum(shape.scenes * shape.views * shape.size[0] * shape.size[1] for shape in drawn)
    return views / scenes, area / scenes


def _drawn(policy: ShapePolicy) -> list[BatchShape]:
    random = np.random.default_rng(0)
    return [policy.draw(random) for _ in range(_DRAWN)]
