"""Any folder of images, for prediction (and for evaluation where its sub-folders are classes)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from datamodules.base import IMAGENET_MEAN, IMAGENET_STD, CropMode, ImageDataModule, StartMethod, Triple, mean_color
from restrike.data.decode import MAX_PIXELS
from restrike.data.folder import list_image_folder, list_images
from restrike.data.index import IMAGE_EXTENSIONS
from restrike.data.loader import EvalLoader, WorkerOptions
from restrike.data.source import FolderSource, class_counts
from restrike.data.transforms import EvalTransform


class ImageFolderDataModule(ImageDataModule):
    """Every image below a folder, in sorted order, each once over all ranks.

    Keys are paths relative to the folder. Without labels, targets are -1.

    Args:
        images: A folder, searched recursively, or one image file.
        labelled: Whether the folder's sub-folders are classes, in torchvision's order; allows `validate` and `test`.
        class_names_file: Text file with one class name a line, to name predictions; null takes the sub-folders'
            names where labelled, else numbers.
        num_classes: Classes of the model.
        image_size: Side of the images in a batch, pixels.
        batch_size_per_device: Images per step of one device.
        crop_pct: Images are resized to image_size / crop_pct before the centre crop.
        crop_mode: "center", "squash" or "border".
        interpolation: Of the resize.
        mean: Of the channels, in [0, 1].
        std: Of the channels.
        max_pixels: Larger pictures count as bad samples.
        max_bad_samples: Unreadable images that are logged and left out (valid=False) before the run ends.
        num_workers: Processes.
        prefetch_factor: Batches that each worker makes ahead.
        pin_memory: Copy batches to pinned memory where CUDA is there.
        start_method: Of workers; null takes the platform's.
        worker_timeout_s: A worker that is silent for so long ends the run; 0 waits for ever.
    """

    def __init__(
        self,
        images: str,
        labelled: bool = False,
        class_names_file: str | None = None,
        num_classes: int = 1000,
        image_size: int = 224,
        batch_size_per_device: int = 128,
        crop_pct: float = 0.875,
        crop_mode: CropMode = "center",
        interpolation: Literal["bilinear", "bicubic"] = "bicubic",
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
        max_pixels: int = MAX_PIXELS,
        max_bad_samples: int = 0,
        num_workers: int = 4,
        prefetch_factor: int = 2,
        pin_memory: bool = True,
        start_method: StartMethod | None = None,
        worker_timeout_s: float = 600.0,
    ) -> None:
        workers = WorkerOptions(num_workers, prefetch_factor, False, pin_memory, start_method, worker_timeout_s)
        super().__init__(image_size, mean, std, workers)
        self.images, self.labelled, self.num_classes = Path(images).expanduser(), labelled, num_classes
        self.batch_size_per_device, self.max_bad_samples = batch_size_per_device, max_bad_samples
        self.transform = EvalTransform(
            image_size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation, fill=mean_color(mean),
            max_pixels=max_pixels,
        )  # fmt: skip
        self.class_names = _read_names(class_names_file, num_classes) if class_names_file else []
        self.class_counts: dict[str, list[int]] = {}
        self._source: FolderSource | None = None

    def setup(self, stage: str) -> None:
        """List the folder.

        Raises:
            ValueError: no image there, or no labels where the stage needs them.
        """
        if stage != "predict" and not self.labelled:
            raise ValueError(f"data.labelled is false: {stage} needs labels, only predict does without")
        self._source = self._open()
        self.class_names = self.class_names or self._source.class_names
        if self.labelled:
            if len(self._source.class_names) != self.num_classes:
                raise ValueError(
                    f"data.num_classes is {self.num_classes}, but {self.images} has "
                    f"{len(self._source.class_names)} class folders"
                )
            self.class_counts = {split: class_counts(self._source) for split in ("val", "test")}

    def predict_dataloader(self) -> EvalLoader:
        """All images."""
        assert self._source is not None, "setup comes first"
        return self.eval_loader(
            self._source, self.transform, self.batch_size_per_device, self.labelled, self.max_bad_samples
        )

    def val_dataloader(self) -> EvalLoader:
        """All images, with labels."""
        return self.predict_dataloader()

    def test_dataloader(self) -> EvalLoader:
        """All images, with labels."""
        return self.predict_dataloader()

    def _open(self) -> FolderSource:
        if self.labelled:
            listing = list_image_folder(self.images, "data.images")
            return FolderSource(self.images, listing.paths, listing.labels, listing.classes)
        if not self.images.exists():
            raise ValueError(f"data.images: no such file or folder: {self.images}")
        root, paths = self.images, list_images(self.images)
        if self.images.is_file():
            root, paths = self.images.parent, [self.images.name]
        if not paths:
            raise ValueError(f"data.images: no image ({', '.join(IMAGE_EXTENSIONS)}) in {self.images}")
        return FolderSource(root, paths, None, [str(label) for label in range(self.num_classes)])


def _read_names(file: str, num_classes: int) -> list[str]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"data.class_names_file: no such file: {path}")
    names = path.read_text(encoding="utf-8").splitlines()
    if len(names) != num_classes:
        raise ValueError(f"data.class_names_file: {path} has {len(names)} lines, data.num_classes is {num_classes}")
    return names
