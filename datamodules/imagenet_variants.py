"""ImageNet's validation set, -V2, -R, -A, -Sketch and ReaL, each by its own protocol, for `test` and `validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from datamodules.base import IMAGENET_MEAN, IMAGENET_STD, CropMode, ImageDataModule, StartMethod, Triple, mean_color
from restrike.data.decode import MAX_PIXELS
from restrike.data.imagenet_variants import NUM_CLASSES, EvaluationSet, ProtocolName, open_evaluation_set, synsets
from restrike.data.loader import EvalLoader, WorkerOptions
from restrike.data.source import FolderSource
from restrike.data.transforms import EvalTransform


class ImageNetVariantsDataModule(ImageDataModule):
    """One test set in the layout of its own archive. With callbacks.benchmark, which counts by the protocol.

    Args:
        images: Folder of the class folders (ReaL: ImageNet's validation images, in class folders or without).
        protocol: "imagenet", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch" or "imagenet-real".
        num_classes: Of the model; the label maps are about 1000.
        image_size: Side of the images in a batch, pixels.
        batch_size_per_device: Images per step of one device.
        crop_pct: Images are resized to image_size / crop_pct before the centre crop.
        crop_mode: "center", "squash" or "border".
        interpolation: Of the resize.
        mean: Of the channels, in [0, 1].
        std: Of the channels.
        max_pixels: Larger pictures count as bad samples.
        max_bad_samples: Unreadable images that are logged and left out before the run ends.
        num_workers: Processes.
        prefetch_factor: Batches that each worker makes ahead.
        pin_memory: Copy batches to pinned memory where CUDA is there.
        start_method: Of workers; null takes the platform's.
        worker_timeout_s: A worker that is silent for so long ends the run; 0 waits for ever.
    """

    only_evaluates = True

    def __init__(
        self,
        images: str,
        protocol: ProtocolName = "imagenet",
        num_classes: int = NUM_CLASSES,
        image_size: int = 224,
        batch_size_per_device: int = 128,
        crop_pct: float = 0.875,
        crop_mode: CropMode = "center",
        interpolation: Literal["bilinear", "bicubic"] = "bicubic",
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
        max_pixels: int = MAX_PIXELS,
        max_bad_samples: int = 0,
        num_workers: int = 8,
        prefetch_factor: int = 2,
        pin_memory: bool = True,
        start_method: StartMethod | None = None,
        worker_timeout_s: float = 600.0,
    ) -> None:
        workers = WorkerOptions(num_workers, prefetch_factor, False, pin_memory, start_method, worker_timeout_s)
        super().__init__(image_size, mean, std, workers)
        if num_classes != NUM_CLASSES:
            raise ValueError(f"data.num_classes: the label maps are about {NUM_CLASSES} classes, got {num_classes}")
        self.images, self.protocol, self.num_classes = Path(images).expanduser(), protocol, num_classes
        self.batch_size_per_device, self.max_bad_samples = batch_size_per_device, max_bad_samples
        self.transform = EvalTransform(
            image_size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation, fill=mean_color(mean),
            max_pixels=max_pixels,
        )  # fmt: skip
        self.class_names = synsets()
        self.evaluation_set: EvaluationSet | None = None

    def setup(self, stage: str) -> None:
        """List the folder, once.

        Raises:
            ValueError: it is not in the layout of the set, or the stage is another than evaluation.
        """
        if stage not in ("validate", "test"):
            raise ValueError(f"data.protocol: {self.protocol} is for test and validate only")
        self.evaluation_set = self.evaluation_set or open_evaluation_set(self.protocol, self.images)

    @property
    def evaluation_frames(self) -> str:
        """Protocol, number of images and hash of their list, for beside a number."""
        assert self.evaluation_set is not None, "setup comes first"
        return self.evaluation_set.description

    def test_dataloader(self) -> EvalLoader:
        """Each image once over all ranks."""
        assert self.evaluation_set is not None, "setup comes first"
        source = FolderSource(self.images, self.evaluation_set.paths, self.evaluation_set.targets, self.class_names)
        # Not "labelled": a target may be the row of a label set, which is no class.
        return self.eval_loader(source, self.transform, self.batch_size_per_device, False, self.max_bad_samples)

    def val_dataloader(self) -> EvalLoader:
        """The same."""
        return self.test_dataloader()
