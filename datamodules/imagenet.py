"""ImageNet, or any set of labelled images in the same form, with the augmentation of the published recipes.

The datamodule owns the loader's position (Lightning's own bookkeeping loses it at an epoch's end). What a run sees at
its n-th step is a pure function of (seed, n, global batch size); see `restrike.data.plan`.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.base import (
    DEFAULT_CACHE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    CropMode,
    ImageDataModule,
    StartMethod,
    Triple,
    mean_color,
)
from restrike.data.affine import AffineJitter
from restrike.data.batches import BadSample, TooManyBadSamplesError, TrainBatches
from restrike.data.cache import ShardCache
from restrike.data.dataset import DatasetLocation, Format, open_split
from restrike.data.decode import MAX_PIXELS
from restrike.data.erasing import random_erase
from restrike.data.loader import EvalLoader, TrainLoader, WorkerOptions
from restrike.data.mixing import Mixing
from restrike.data.opener import Transfer
from restrike.data.plan import DEFAULT_LANES, START, EpochPlan, Position, nearest_position
from restrike.data.samples import ImageBatch
from restrike.data.source import ImageSource, class_counts
from restrike.data.transforms import EvalTransform, TrainTransform

_LOG = logging.getLogger(__name__)


class ImageNetDataModule(ImageDataModule):
    """Labelled images from shards (local or remote) or from a folder tree. The defaults are FasterViT's recipe.

    Args:
        data: Folder or URL (http, https, s3) of a prepared set, a folder of foreign shards, or a folder with
            train/<class>/<image> and val/<class>/<image>.
        format: "auto" looks what is there.
        num_classes: Classes of the set; it is an error if the data has another number.
        image_size: Side of the images in a batch, pixels.
        batch_size_per_device: Training images per step of one device.
        val_batch_size_per_device: The same for validation and test.
        test_split: Split that `test` runs on; null takes the validation split, as ImageNet's papers do.
        train_shards: Names of the training shards where there is no catalogue, such as x-train-{0000..1023}.tar.
        val_shards: The same for validation; a full URL, or pipe:COMMAND where allow_pipe is set.
        seed: Of the sample order and all augmentation.
        crop: "random_resized", or "resize" to squash the whole picture.
        scale: Range of a random crop's share of the area.
        ratio: Range of a random crop's width / height.
        interpolation: In training; "random" draws bilinear or bicubic per image.
        hflip: Probability of a horizontal flip.
        rand_augment: RandAugment policy in timm's notation, or null.
        jitter: Small affine jitter, or null.
        mixup: Alpha of mixup's Beta distribution; 0 = off.
        cutmix: Alpha of CutMix's Beta distribution; 0 = off.
        mix_prob: Probability that a batch is mixed.
        switch_prob: Probability of CutMix where both are on.
        mix_box_rule: How CutMix rounds an odd box; the release used timm 0.9.6.
        label_smoothing: Of the training targets.
        erase_prob: Probability of random erasing per image.
        erase_area: Range of the erased share of the area.
        erase_aspect: Range of the erased box's height / width.
        crop_pct: Evaluation resizes to image_size / crop_pct before the centre crop.
        crop_mode: "center", "squash" or "border".
        eval_interpolation: In evaluation.
        mean: Of the channels, in [0, 1].
        std: Of the channels.
        native_decode: C extension that decodes cropped regions only: "auto" (where it was built), "on", "off".
        dct_scaling: Decode large images at reduced size in training; faster, pixels differ slightly.
        max_pixels: Larger pictures count as bad samples.
        num_workers: Processes per loader and rank.
        prefetch_factor: Batches that each worker makes ahead.
        persistent_workers: Keep workers between epochs.
        pin_memory: Copy batches to pinned memory where CUDA is there.
        start_method: Of workers; null takes the platform's.
        worker_timeout_s: A worker that is silent for so long ends the run; 0 waits for ever.
        lanes: Segments of an epoch that a batch draws from; part of the sample order.
        shuffle_shards: Shards of a lane that are shuffled together; part of the sample order.
        max_bad_samples: Unreadable training images per epoch and rank that are logged and replaced before the run ends.
        max_bad_val_samples: The same in evaluation, where they are left out of the metrics; 0 = end at the first.
        cache_dir: Where remote shards are kept on this node; null takes ~/.cache/restrike.
        cache_bytes: Bound of that folder, least recently used out first; 0 = none.
        allow_pipe: Let pipe: locations run shell commands.
        fetch_attempts: Tries for each remote file.
        fetch_timeout_s: Seconds without a byte before a try counts as failed.
    """

    def __init__(
        self,
        data: str,
        format: Format = "auto",
        num_classes: int = 1000,
        image_size: int = 224,
        batch_size_per_device: int = 128,
        val_batch_size_per_device: int = 128,
        test_split: str | None = None,
        train_shards: str | None = None,
        val_shards: str | None = None,
        seed: int = 0,
        crop: Literal["random_resized", "resize"] = "random_resized",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: Literal["random", "bilinear", "bicubic"] = "random",
        hflip: float = 0.5,
        rand_augment: str | None = "rand-m9-mstd0.5-inc1",
        jitter: AffineJitter | None = None,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        mix_prob: float = 1.0,
        switch_prob: float = 0.5,
        mix_box_rule: Literal["timm_0.9.6", "timm_1.x"] = "timm_0.9.6",
        label_smoothing: float = 0.1,
        erase_prob: float = 0.25,
        erase_area: tuple[float, float] = (0.02, 1 / 3),
        erase_aspect: tuple[float, float] = (0.3, 1 / 0.3),
        crop_pct: float = 0.875,
        crop_mode: CropMode = "center",
        eval_interpolation: Literal["bilinear", "bicubic"] = "bicubic",
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
        native_decode: Literal["auto", "on", "off"] = "auto",
        dct_scaling: bool = False,
        max_pixels: int = MAX_PIXELS,
        num_workers: int = 8,
        prefetch_factor: int = 2,
        persistent_workers: bool = True,
        pin_memory: bool = True,
        start_method: StartMethod | None = None,
        worker_timeout_s: float = 600.0,
        lanes: int = DEFAULT_LANES,
        shuffle_shards: int = 8,
        max_bad_samples: int = 20,
        max_bad_val_samples: int = 0,
        cache_dir: str | None = None,
        cache_bytes: int = 0,
        allow_pipe: bool = False,
        fetch_attempts: int = 6,
        fetch_timeout_s: float = 30.0,
    ) -> None:
        workers = WorkerOptions(
            num_workers, prefetch_factor, persistent_workers, pin_memory, start_method, worker_timeout_s
        )
        super().__init__(image_size, mean, std, workers)
        patterns = {"train": train_shards, "validation": val_shards}
        self.location = DatasetLocation(
            data, format, num_classes, {split: names for split, names in patterns.items() if names}, shuffle_shards
        )
        self.num_classes, self.seed, self.lanes = num_classes, seed, lanes
        self.batch_size_per_device, self.val_batch_size_per_device = batch_size_per_device, val_batch_size_per_device
        self.test_split = test_split or "validation"
        self.erase_prob, self.erase_area, self.erase_aspect = erase_prob, erase_area, erase_aspect
        self.max_bad_samples, self.max_bad_val_samples = max_bad_samples, max_bad_val_samples
        fill = mean_color(mean)
        self.train_transform = TrainTransform(
            image_size, crop=crop, scale=scale, ratio=ratio, interpolation=interpolation, hflip=hflip,
            rand_augment=rand_augment, fill=fill, jitter=jitter, native=native_decode, dct_scaling=dct_scaling,
            max_pixels=max_pixels,
        )  # fmt: skip
        self.eval_transform = EvalTransform(
            image_size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=eval_interpolation, fill=fill,
            max_pixels=max_pixels,
        )  # fmt: skip
        mixing = Mixing(num_classes, mixup, cutmix, mix_prob, switch_prob, label_smoothing, mix_box_rule)
        self.mixing = mixing if mixing.is_active or label_smoothing else None
        if mixing.is_active and batch_size_per_device % 2:
            raise ValueError(
                f"data.batch_size_per_device: mixing pairs images, so an even number; got {batch_size_per_device}"
            )
        self.cache = ShardCache(
            Path(cache_dir or DEFAULT_CACHE).expanduser(),
            cache_bytes,
            Transfer(attempts=fetch_attempts, timeout_s=fetch_timeout_s, allow_pipe=allow_pipe),
        )
        self.class_names: list[str] = []
        self.class_counts: dict[str, list[int]] = {}  # images per class of train, val, test
        self._sources: dict[str, ImageSource] = {}
        self._train_loader: TrainLoader | None = None
        self._restored: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Open and check the splits that the stage needs, before any worker starts."""
        if stage == "fit":
            # Lightning looks for the position in the loader only, finds none, and warns at every resume.
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
            self._train_loader = self._restored = None
            self.class_counts["train"] = class_counts(self._source("train"))
        if stage in ("fit", "validate"):
            self.class_counts["val"] = class_counts(self._source("validation"))
        if stage == "test":
            self.class_counts["test"] = class_counts(self._source(self.test_split))

    def train_dataloader(self) -> TrainLoader:
        """From the restored position, or where the last loader of this fit stopped, or this epoch's beginning."""
        source = self._source("train")
        plan = EpochPlan(
            source.shard_sizes, self.batch_size_per_device * self.world_size, self.seed, source.window, self.lanes
        )
        batches = TrainBatches(source, self.train_transform, self.mixing, self.seed, self.rank, self.max_bad_samples)
        repeat = bool(getattr(self.trainer, "overfit_batches", 0))
        position = self._first_position(plan, source)
        self._train_loader = TrainLoader(
            plan, batches, self.workers, self.rank, self.world_size, position, self.cache, repeat
        )
        self._loaders.add(self._train_loader)
        return self._train_loader

    def val_dataloader(self) -> EvalLoader:
        """The validation split, each image once over all ranks."""
        return self._evaluation("validation")

    def test_dataloader(self) -> EvalLoader:
        """The split `test_split`, each image once over all ranks."""
        return self._evaluation(self.test_split)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise; in training erase boxes, with randomness from the batch's own seed."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, ImageBatch) and self.erase_prob and self.trainer and self.trainer.training:
            random_erase(
                batch.images,
                probability=self.erase_prob,
                area=self.erase_area,
                aspect=self.erase_aspect,
                generator=torch.Generator().manual_seed(batch.seed),
            )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it means something for. Equal on all ranks."""
        position = self._train_loader.position if self._train_loader else START
        source = self._sources.get("train")
        return {
            "epoch": position.epoch,
            "step": position.step,
            "seed": self.seed,
            "world_size": self.world_size,
            "batch_size_per_device": self.batch_size_per_device,
            "lanes": self.lanes,
            "fingerprint": source.fingerprint if source else "",
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before `train_dataloader`, which goes on from there."""
        self._restored = dict(state_dict)

    @property
    def bad_samples(self) -> int:
        """Training images of this rank that were replaced so far in this epoch."""
        return self._train_loader.bad_samples.count if self._train_loader else 0

    def _source(self, split: str) -> ImageSource:
        if split not in self._sources:
            source = open_split(self.location, split, self.cache)
            self._check_labels(source, self.max_bad_samples if split == "train" else self.max_bad_val_samples)
            self.class_names = source.class_names
            self._sources[split] = source
        return self._sources[split]

    @staticmethod
    def _check_labels(source: ImageSource, allowed: int) -> None:
        """Labels are known before anything is read: tell at once, and not in the middle of an epoch."""
        wrong = ((source.labels < 0) | (source.labels >= len(source.class_names))).nonzero()[0]
        if len(wrong) == 0:
            return
        first = int(wrong[0])
        reason = f"label {source.labels[first]} is out of range: the set has classes 0 to {len(source.class_names) - 1}"
        example = BadSample(source.key(first), source.place(first), reason)
        message = f"{len(wrong)} images have no usable label; the first: {example}"
        if len(wrong) > allowed:
            raise TooManyBadSamplesError(f"{message}; max_bad_samples allows {allowed}")
        _LOG.warning(message)

    def _evaluation(self, split: str) -> EvalLoader:
        return self.eval_loader(
            self._source(split), self.eval_transform, self.val_batch_size_per_device, True, self.max_bad_val_samples
        )

    def _first_position(self, plan: EpochPlan, source: ImageSource) -> Position:
        if self._train_loader is not None:
            return self._train_loader.position
        if self._restored is None:
            return Position(self.trainer.current_epoch if self.trainer else 0, 0)
        saved = self._restored
        now = {"seed": self.seed, "lanes": self.lanes, "fingerprint": source.fingerprint}
        changed = [name for name, value in now.items() if saved.get(name, value) != value]
        if changed:
            _LOG.warning(
                "the checkpoint was made with another %s of the data: the order of the images is not continued, only "
                "their number", " and ".join(changed),
            )  # fmt: skip
        position = Position(saved["epoch"], saved["step"])
        before = saved["batch_size_per_device"] * saved["world_size"]
        if before == plan.global_batch_size and position.step < plan.steps:
            return position
        position = nearest_position(position.step * before, position.epoch, plan)
        _LOG.warning(
            "the checkpoint was made with a global batch of %d, this run has %d (%d x %d ranks): it goes on at the "
            "nearest step, %d of epoch %d; some images of this epoch may come twice or not at all",
            before, plan.global_batch_size, self.batch_size_per_device, self.world_size, position.step, position.epoch,
        )  # fmt: skip
        return position
