"""One datamodule for all multi-view families: a filter, a sampler of views, a batch shape and a transform over one set.

`conf/data/co3d_<family>.yaml` names the four of each family. What a run sees at its n-th step is a pure function of
(seed, n, global batch); only the frames that are drawn are read and decoded.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from datamodules.base import DEFAULT_CACHE, ImageDataModule, StartMethod, Triple
from restrike.data.cache import ShardCache
from restrike.data.loader import EvalLoader, TrainLoader, WorkerOptions
from restrike.data.multiview_batches import (
    SceneEvalBatches,
    SceneItems,
    SceneTrainBatches,
    create_scene_eval_loader,
    create_scene_train_loader,
)
from restrike.data.multiview_filter import SceneFilter
from restrike.data.multiview_frames import (
    DrawnViews,
    draw_every_scene,
    find_frames,
    frame_lists_hash,
    frame_lists_of,
    load_frame_lists,
    load_frame_orders,
    save_frame_lists,
)
from restrike.data.multiview_plan import FixedShape, Order, ScenePlan, ShapePolicy
from restrike.data.multiview_source import Access, SceneSource, open_scenes
from restrike.data.multiview_transforms import ViewTransform
from restrike.data.opener import Transfer
from restrike.data.plan import EpochPlan, Position, nearest_position
from restrike.data.samples import MultiViewBatch
from restrike.data.views import ViewSampler

_LOG = logging.getLogger(__name__)


class CO3DDataModule(ImageDataModule):
    """Scenes of several views from a set that `python -m cli prepare co3d` made.

    Args:
        data: Folder or URL of the set.
        sampler: Which views of a sequence.
        shape: View count, image size and scenes per rank of a step.
        transform: Stored frames to training views.
        filter: Sequences and frames to train on.
        val_filter: Sequences and frames to evaluate on.
        val_shape: The same for every evaluation batch.
        val_transform: Without augmentation.
        val_sampler: null takes `sampler`.
        val_frames: File with the frames to evaluate on, {category: {sequence: [frame numbers]}}, or a folder of
            `<category>.json` with RelPose++'s orders. null draws them by `val_sampler` and `seed`, and writes
            `val_frames.json` into the run folder.
        protocol: What an evaluation is called; with the hash of its frames it then stands beside a test's numbers.
        seed: Of order, views, shapes and augmentation.
        order: "permuted" deals every sample equally often; "independent" draws each anew (VGGT).
        epoch_length: Samples per epoch; null = as many as there are ("N @" in CUT3R's recipes).
        steps_per_epoch: Of an "independent" order.
        mean: Of the channels, in [0, 1].
        std: Of the channels.
        num_workers: Processes per loader and rank.
        prefetch_factor: Batches that each worker makes ahead.
        persistent_workers: Keep workers between epochs.
        pin_memory: Copy batches to pinned memory where CUDA is there.
        start_method: Of workers; null takes the platform's.
        worker_timeout_s: A worker that is silent for so long ends the run; 0 waits for ever.
        max_bad_samples: Unusable training scenes per epoch and rank that are logged and replaced before the run ends.
        max_bad_val_samples: The same in evaluation, where they are left out of the metrics; 0 = end at the first.
        access: How to read remote shards: "cache" brings each whole to this node when first needed, "range" reads the
            drawn frames alone, every time (one pass, evaluation, small disks).
        cache_dir: Where remote shards are kept on this node; null takes ~/.cache/restrike.
        cache_bytes: Bound of that folder, least recently used out first; 0 = none.
        fetch_attempts: Tries for each remote file.
        fetch_timeout_s: Seconds without a byte before a try counts as failed.
    """

    def __init__(
        self,
        data: str,
        sampler: ViewSampler,
        shape: ShapePolicy,
        transform: ViewTransform,
        filter: SceneFilter,
        val_filter: SceneFilter,
        val_shape: FixedShape,
        val_transform: ViewTransform,
        val_sampler: ViewSampler | None = None,
        val_frames: str | None = None,
        protocol: str | None = None,
        seed: int = 0,
        order: Order = "permuted",
        epoch_length: int | None = None,
        steps_per_epoch: int | None = None,
        mean: Triple = (0.0, 0.0, 0.0),
        std: Triple = (1.0, 1.0, 1.0),
        num_workers: int = 8,
        prefetch_factor: int = 2,
        persistent_workers: bool = True,
        pin_memory: bool = True,
        start_method: StartMethod | None = None,
        worker_timeout_s: float = 600.0,
        max_bad_samples: int = 20,
        max_bad_val_samples: int = 0,
        access: Access = "cache",
        cache_dir: str | None = None,
        cache_bytes: int = 0,
        fetch_attempts: int = 6,
        fetch_timeout_s: float = 30.0,
    ) -> None:
        workers = WorkerOptions(
            num_workers, prefetch_factor, persistent_workers, pin_memory, start_method, worker_timeout_s
        )
        super().__init__(val_shape.size[1], mean, std, workers)
        self.data, self.seed, self.order, self.access = data, seed, order, access
        self.protocol = protocol
        self.sampler, self.val_sampler, self.val_frames = sampler, val_sampler or sampler, val_frames
        self.shape, self.val_shape = shape, val_shape
        self.transform, self.val_transform = transform, val_transform
        self.filters = {"train": filter, "val": val_filter}
        self.epoch_length, self.steps_per_epoch = epoch_length, steps_per_epoch
        self.max_bad_samples, self.max_bad_val_samples = max_bad_samples, max_bad_val_samples
        # With a varying view count it is the scenes of the largest; the view budget is what stays the same.
        self.batch_size_per_device = shape.scenes
        self.cache = ShardCache(
            Path(cache_dir or DEFAULT_CACHE).expanduser(),
            cache_bytes,
            Transfer(attempts=fetch_attempts, timeout_s=fetch_timeout_s),
        )
        self.scene_counts: dict[str, int] = {}
        self._sources: dict[str, SceneSource] = {}
        self._drawn: list[DrawnViews] = []
        self._train_loader: TrainLoader | None = None
        self._restored: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Open and check what the stage needs, before any worker starts."""
        if stage == "fit":
            # Lightning looks for the position in the loader only, finds none, and warns at every resume.
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
            self._train_loader = self._restored = None
            self._source("train")
            self._check_length(self._source("train"))
        self._drawn = self._frozen_views(self._source("val"))

    def train_dataloader(self) -> TrainLoader:
        """From the restored position, or where the last loader of this fit stopped, or this epoch's beginning."""
        source = self._source("train")
        items = SceneItems(source, self.sampler, self.shape.max_views)
        plan = ScenePlan(
            len(items), self.shape, self.seed, self.world_size, self.epoch_length, self.order, self.steps_per_epoch
        )
        batches = SceneTrainBatches(source, items, self.sampler, plan, self.transform, self.rank, self.max_bad_samples)
        position = self._first_position(plan, source)
        repeat = bool(getattr(self.trainer, "overfit_batches", 0))
        self._train_loader = create_scene_train_loader(
            plan, batches, self.workers, self.rank, self.world_size, position, self.cache, repeat
        )
        self._loaders.add(self._train_loader)
        return self._train_loader

    def val_dataloader(self) -> EvalLoader:
        """Each sequence once over all ranks; padding rows have valid=False."""
        batches = SceneEvalBatches(
            self._source("val"), self._drawn, self.val_shape, self.val_transform, self.seed, self.max_bad_val_samples
        )
        loader = create_scene_eval_loader(batches, self.workers, self.rank, self.world_size)
        self._loaders.add(loader)
        return loader

    def test_dataloader(self) -> EvalLoader:
        """As validation."""
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Images to normalised float32 on their device; everything else is left as it is."""
        if not isinstance(batch, MultiViewBatch):
            return batch
        return batch._replace(images=normalize_views(batch.images, self.mean, self.std))

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it means something for. Equal on all ranks."""
        if self._train_loader is None:
            return {}
        position, plan = self._train_loader.position, cast(ScenePlan, self._train_loader.plan)
        return {"epoch": position.epoch, "step": position.step, **self._identity(plan, self._source("train"))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before `train_dataloader`, which goes on from there."""
        self._restored = dict(state_dict) or None

    @property
    def evaluation_frames(self) -> str | None:
        """Protocol, number of frames and hash of their list, for beside a test's numbers; None without a protocol."""
        return self._describe(self._source("val"), [self._drawn])

    def _describe(self, source: SceneSource, drawn: list[list[DrawnViews]]) -> str | None:
        """Of one or several lists of frames."""
        if self.protocol is None:
            return None
        hashes = [frame_lists_hash(frame_lists_of(source, views))[:16] for views in drawn]
        count = sum(len(one.positions) for views in drawn for one in views)
        sequences = len({one.scene for views in drawn for one in views})
        return f"{self.protocol}; {sequences:,} sequences, {count:,} frames; frame list sha256 {', '.join(hashes)}"

    @property
    def bad_samples(self) -> int:
        """Training scenes of this rank that were replaced so far in this epoch."""
        return self._train_loader.bad_samples.count if self._train_loader else 0

    def _source(self, split: str) -> SceneSource:
        if split not in self._sources:
            source = open_scenes(self.data, self.cache, self.filters[split], self.access)
            if len(source) == 0:
                raise ValueError(
                    f"data.{'' if split == 'train' else 'val_'}filter leaves no sequence of {self.data}; loosen "
                    "categories, subsets, min_quality or min_frames"
                )
            self.scene_counts[split] = len(source)
            self._sources[split] = source
        return self._sources[split]

    def _check_length(self, source: SceneSource) -> None:
        views = self.shape.max_views
        if len(SceneItems(source, self.sampler, views)) == 0:
            longest = max(len(rows) for rows in source.rows)
            raise ValueError(
                f"data.shape asks for {views} views, and the longest sequence has {longest} usable frames; lower "
                "data.shape.init_args.views, or set allow_repeat in data.sampler"
            )

    def _frozen_views(self, source: SceneSource) -> list[DrawnViews]:
        """Of the list that was given; else as the seed draws them, and then they are written down."""
        views = self.val_shape.views
        if self.val_frames is not None:
            path = Path(self.val_frames).expanduser()
            lists = load_frame_orders(path, source) if path.is_dir() else load_frame_lists(path)
            return find_frames(source, lists, views, str(path))
        drawn = draw_every_scene(source, self.val_sampler, views, self.seed)
        if self.trainer and self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            save_frame_lists(Path(self.trainer.default_root_dir) / "val_frames.json", frame_lists_of(source, drawn))
        return drawn

    def _first_position(self, plan: ScenePlan, source: SceneSource) -> Position:
        if self._train_loader is not None:
            return self._train_loader.position
        if self._restored is None:
            return Position(self.trainer.current_epoch if self.trainer else 0, 0)
        saved = self._restored
        position = Position(saved["epoch"], saved["step"])
        now = self._identity(plan, source)
        changed = [name for name, value in now.items() if saved.get(name, value) != value]
        if changed:
            _LOG.warning(
                "the checkpoint was made with another %s of the data: it goes on at the nearest step, and scenes of "
                "this epoch may come twice or not at all",
                " and ".join(changed),
            )
        if "global_batch_size" in changed and self.order == "permuted":
            return nearest_position(position.step * saved["global_batch_size"], position.epoch, cast(EpochPlan, plan))
        return position if position.step < plan.steps else Position(position.epoch + 1, 0)

    def _identity(self, plan: ScenePlan, source: SceneSource) -> dict[str, Any]:
        """What the order of scenes depends on. Ranks do not count where the global batch stays."""
        return {
            "seed": self.seed,
            "global_batch_size": plan.global_batch_size,
            "order": self.order,
            "fingerprint": source.fingerprint,
        }


def normalize_views(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8, or float in [0, 1], [..., 3, H, W] to normalised float32."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]
