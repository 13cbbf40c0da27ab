"""What a worker of a multi-view loader does: a step's request into a batch of scenes, of only the frames it drew.

A batch follows from its request alone: the shape from (seed, epoch, step), a scene's views and crops from (seed, epoch,
step, its slot among all ranks). So neither workers, nor a resume, nor the number of ranks (at the same global batch)
change what is seen.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch.utils.data import Dataset

from restrike.data.batches import BadSample, LoadedBatch, Request, TrainBatches
from restrike.data.cache import ShardCache
from restrike.data.loader import EvalLoader, TrainLoader, WorkerOptions
from restrike.data.multiview_frames import DrawnViews, draw_views
from restrike.data.multiview_plan import BatchShape, FixedShape, ScenePlan
from restrike.data.multiview_source import SceneSource
from restrike.data.multiview_transforms import ViewTransform
from restrike.data.plan import START, EpochPlan, Position
from restrike.data.randomness import Purpose, device_seed, stream
from restrike.data.samples import ImageBatch, MultiViewBatch, MultiViewSample
from restrike.data.shards import ShardFile
from restrike.data.source import BadSampleError
from restrike.data.views import ViewSampler


class SceneItems:
    """The samples of a source: each sequence, or each start frame of each sequence (CUT3R).

    Attributes:
        scenes, starts: int64 [n].
    """

    def __init__(self, source: SceneSource, sampler: ViewSampler, views: int) -> None:
        counts = np.array([sampler.items(len(rows), views) for rows in source.rows], dtype=np.int64)
        self.scenes = np.repeat(np.arange(len(counts)), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        self.starts = np.arange(len(self.scenes)) - first

    def __len__(self) -> int:
        return len(self.scenes)


class _TrainScenes:
    """Items as what the loader asks for shards ahead of their use."""

    def __init__(self, source: SceneSource, items: SceneItems) -> None:
        self._source, self._items = source, items

    def will_read(self, items: np.ndarray) -> list[ShardFile]:
        """As the source's, of items."""
        return self._source.will_read(np.unique(self._items.scenes[items]))


class SceneTrainBatches(Dataset[LoadedBatch]):
    """Training batches by request; a scene that cannot be used is replaced by the next, so that steps stay equal.

    Args:
        source: sequences.
        sampler: chooses the views.
        plan: tells a step's shape.
        transform: of the views.
        rank: of this process; its scenes fill slots [rank * scenes, …) of the global batch.
        max_bad_samples: gives up within one batch after that many.
    """

    def __init__(
        self,
        source: SceneSource,
        items: SceneItems,
        sampler: ViewSampler,
        plan: ScenePlan,
        transform: ViewTransform,
        rank: int = 0,
        max_bad_samples: int = 0,
    ) -> None:
        self.source, self._scenes = _TrainScenes(source, items), source
        self.items, self.sampler, self.transform = items, sampler, transform
        self.plan, self.rank, self.max_bad_samples = plan, rank, max_bad_samples

    def __getitem__(self, request: Request) -> LoadedBatch:
        shape = self.plan.shape(Position(request.epoch, request.step))
        bad: list[BadSample] = []
        samples, keys = [], []
        for row, item in enumerate(request.ids.tolist()):
            slot = self.rank * shape.scenes + row
            while len(bad) <= self.max_bad_samples:
                scene = int(self.items.scenes[item])
                try:
                    samples.append(self._sample(item, shape, request.epoch, request.step, slot))
                    keys.append(self._scenes.key(scene))
                    break
                except (BadSampleError, OSError) as error:
                    bad.append(BadSample(self._scenes.key(scene), self._scenes.place(scene), str(error)))
                    item = (item + 1) % len(self.items)
            else:
                return LoadedBatch(request.epoch, None, bad)
        seed = device_seed(self.plan.seed, request.epoch, request.step, self.rank)
        valid = torch.ones(len(samples), dtype=torch.bool)
        return LoadedBatch(request.epoch, cast(ImageBatch, stack_scenes(samples, valid, keys, seed)), bad)

    def _sample(self, item: int, shape: BatchShape, *position: int) -> MultiViewSample:
        """One item at a place in the run, which its randomness follows from."""
        random = stream(self.plan.seed, Purpose.VIEWS, *position)
        scene, start = int(self.items.scenes[item]), int(self.items.starts[item])
        drawn = draw_views(self._scenes, self.sampler, scene, start, shape.views, random)
        kept = slice(shape.kept_views)  # DiffusionSfM cuts after normalising by view 0: the same
        views = self._scenes.read(scene, drawn.positions[kept])
        return self.transform(views, shape.size, drawn.is_video[kept], random)


class SceneEvalBatches(Dataset[LoadedBatch]):
    """Evaluation batches by request: each of the drawn scenes once; padding rows are masked.

    Args:
        source: sequences.
        drawn: the scenes and their views.
        shape: of every batch.
        transform: of the views.
        seed: of what the transform draws, if anything.
        max_bad_samples: 0 = the first scene that cannot be used ends the run.
    """

    def __init__(
        self,
        source: SceneSource,
        drawn: list[DrawnViews],
        shape: FixedShape,
        transform: ViewTransform,
        seed: int,
        max_bad_samples: int = 0,
    ) -> None:
        self.source, self._scenes, self.transform, self.seed = drawn, source, transform, seed
        self.shape, self.max_bad_samples = shape, max_bad_samples

    def __getitem__(self, request: Request) -> LoadedBatch:
        bad: list[BadSample] = []
        rows: list[MultiViewSample | None] = []
        keys = []
        for item in request.ids.tolist():
            rows.append(None)
            keys.append(self._scenes.key(self.source[item].scene) if item >= 0 else "")
            if item < 0:
                continue
            try:
                rows[-1] = self._sample(item)
            except (BadSampleError, OSError) as error:
                bad.append(BadSample(keys[-1], self._scenes.place(self.source[item].scene), str(error)))
                if len(bad) > self.max_bad_samples:
                    return LoadedBatch(request.epoch, None, bad)
        # A rank without own sequences still needs the shape of a batch; its rows are masked.
        filler = next((row for row in rows if row is not None), None) or self._sample(0)
        valid = torch.tensor([row is not None for row in rows])
        samples = [filler if row is None else row for row in rows]
        return LoadedBatch(request.epoch, cast(ImageBatch, stack_scenes(samples, valid, keys, 0)), bad)

    def _sample(self, item: int) -> MultiViewSample:
        scene, positions, is_video = self.source[item]
        views = self._scenes.read(scene, positions)
        return self.transform(views, self.shape.size, is_video, stream(self.seed, Purpose.VIEWS, scene))


def stack_scenes(samples: list[MultiViewSample], valid: torch.Tensor, keys: list[str], seed: int) -> MultiViewBatch:
    """Samples of equal shape to one batch."""
    stacked = [torch.stack(values) for values in zip(*samples, strict=True)]
    return MultiViewBatch(**dict(zip(MultiViewSample._fields, stacked, strict=True)), valid=valid, keys=keys, seed=seed)


def create_scene_train_loader(
    plan: ScenePlan,
    batches: SceneTrainBatches,
    options: WorkerOptions,
    rank: int,
    world_size: int,
    position: Position = START,
    cache: ShardCache | None = None,
    repeat: bool = False,
) -> TrainLoader:
    """The image loader over scenes: it needs of plan and batches only what ours share with the images'."""
    scene_plan, scene_batches = cast(EpochPlan, plan), cast(TrainBatches, batches)
    return TrainLoader(scene_plan, scene_batches, options, rank, world_size, position, cache, repeat)


def create_scene_eval_loader(
    batches: SceneEvalBatches, options: WorkerOptions, rank: int = 0, world_size: int = 1
) -> EvalLoader:
    """Each sequence once over all ranks."""
    return EvalLoader(batches, batches.shape.scenes, options, rank, world_size)  # type: ignore[arg-type]
