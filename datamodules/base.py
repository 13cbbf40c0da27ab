"""What image datamodules share: this process's place among the ranks, worker options, normalisation on the device."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from restrike.data.erasing import normalize
from restrike.data.loader import EvalLoader, TrainLoader, WorkerOptions, create_eval_loader
from restrike.data.samples import ImageBatch
from restrike.data.source import ImageSource
from restrike.data.transforms import EvalTransform

StartMethod = Literal["fork", "spawn", "forkserver"]
CropMode = Literal["center", "squash", "border"]
Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
DEFAULT_CACHE = Path("~/.cache/restrike")


class ImageDataModule(LightningDataModule):
    """Base of the image datamodules.

    Args:
        image_size: side of a batch's images, pixels.
        mean, std: per channel, of values in [0, 1].
        workers: of each loader.
    """

    def __init__(self, image_size: int, mean: Triple, std: Triple, workers: WorkerOptions) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"data.mean, data.std: three numbers each, std above 0; got {mean} and {std}")
        self.image_size, self.mean, self.std = image_size, tuple(mean), tuple(std)
        self.workers = workers
        self._loaders: weakref.WeakSet[TrainLoader | EvalLoader] = weakref.WeakSet()

    @property
    def rank(self) -> int:
        """Of this process among all; asked of the trainer, which is told, and not of the environment, which lies."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        """Processes that share an epoch."""
        return self.trainer.world_size if self.trainer else 1

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """uint8 images to normalised float32 on their device."""
        if not isinstance(batch, ImageBatch):
            return batch
        return batch._replace(images=normalize(batch.images, self.mean, self.std))

    def teardown(self, stage: str) -> None:
        """Stop the workers of all loaders."""
        for loader in self._loaders:
            loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """As `teardown`, which a trainer skips when it fails."""
        self.teardown("")

    def eval_loader(
        self,
        source: ImageSource,
        transform: EvalTransform,
        batch_size: int,
        labelled: bool,
        max_bad_samples: int,
    ) -> EvalLoader:
        """Each image once over all ranks; padding rows have valid=False."""
        loader = create_eval_loader(
            source,
            transform,
            self.image_size,
            batch_size,
            rank=self.rank,
            world_size=self.world_size,
            options=self.workers,
            labelled=labelled,
            max_bad_samples=max_bad_samples,
        )
        self._loaders.add(loader)
        return loader


def mean_color(mean: Triple) -> tuple[int, int, int]:
    """The data set's mean as an 8-bit colour, to fill what a warp uncovers (as timm does)."""
    red, green, blue = (min(255, round(255 * value)) for value in mean)
    return red, green, blue
