"""A folder of photographs of one scene, for prediction: windows of views for networks that see them together, or one
photo after another for networks that stream."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule

from datamodules.co3d import normalize_views
from restrike.data.decode import MAX_PIXELS, DecodeError
from restrike.data.photo_views import PhotoTransform, PhotoView, views_batch
from restrike.data.photos import list_photos, open_photo
from restrike.data.samples import MultiViewBatch
from restrike.export.scene_windows import windows

_log = logging.getLogger(__name__)
_Triple = tuple[float, float, float]


class PhotoFolderDataModule(LightningDataModule):
    """Photos in sorted order as batches of one scene. Cameras and depth in the batches are unknown (NaN and 0).

    A photo that cannot be read is logged, listed in `skipped`, and left out.

    Args:
        images: A folder, searched recursively, or one photo.
        out: New folder for the scene; `callbacks.WriteScene` fills it.
        transform: How the family loads a photo (`restrike.data.photo_views`).
        mean: Of the channels, in [0, 1].
        std: Of the channels.
        is_streaming: The network sees one photo after another and keeps what it knows itself.
        max_views: Photos that a network sees together; more are split into windows. Memory grows with it.
        overlap: Photos that a window shares with the one before, by which the two are brought together.
        max_photos: Of more photos, so many are taken, evenly.
        max_pixels: Larger photos are left out.
        num_threads: Threads that decode.
    """

    def __init__(
        self,
        images: str,
        out: str,
        transform: PhotoTransform,
        mean: _Triple = (0.0, 0.0, 0.0),
        std: _Triple = (1.0, 1.0, 1.0),
        is_streaming: bool = False,
        max_views: int = 64,
        overlap: int = 8,
        max_photos: int = 1000,
        max_pixels: int = MAX_PIXELS,
        num_threads: int = 4,
    ) -> None:
        super().__init__()
        for name, value in {"max_views": max_views, "max_photos": max_photos, "num_threads": num_threads}.items():
            if value < 1:
                raise ValueError(f"data.{name}: expected 1 or more, got {value}")
        self.images, self.out = Path(images).expanduser(), Path(out).expanduser()
        self.transform, self.mean, self.std, self.is_streaming = transform, tuple(mean), tuple(std), is_streaming
        self.max_views, self.overlap = (1, 0) if is_streaming else (max_views, overlap)
        self.max_photos, self.max_pixels, self.num_threads = max_photos, max_pixels, num_threads
        self.paths: list[str] = []
        self.skipped: dict[str, str] = {}

    @property
    def root(self) -> Path:
        """The folder that `paths` are relative to."""
        return self.images.parent if self.images.is_file() else self.images

    def setup(self, stage: str) -> None:
        """List the photos.

        Raises:
            ValueError: another stage than predict, or no photos.
        """
        if stage != "predict":
            raise ValueError(f"photos have no cameras to compare with: {stage} needs a data set, only predict does not")
        found = list_photos(self.images)
        self.paths = found
        if len(found) > self.max_photos:
            rows = torch.linspace(0, len(found) - 1, self.max_photos).round().long().tolist()
            self.paths = [found[row] for row in rows]
            _log.warning(
                "%s: %d photos, of which %d are taken evenly (data.max_photos)", self.images, len(found), len(rows)
            )
        self.skipped = {}

    def predict_dataloader(self) -> _Windows:
        """One batch a window."""
        return _Windows(self)

    def on_after_batch_transfer(self, batch: MultiViewBatch, dataloader_idx: int) -> MultiViewBatch:
        """Normalise."""
        return batch._replace(images=normalize_views(batch.images, self.mean, self.std))

    def load(self, path: str) -> PhotoView | None:
        """One photo; None if it cannot be read, which is logged once."""
        try:
            return self.transform(open_photo(self.root / path, self.max_pixels))
        except DecodeError as error:
            if path not in self.skipped:
                _log.warning("left out %s: %s", path, error)
            self.skipped[path] = str(error)
            return None


class _Windows:
    """Batches of the windows, decoded on threads while the network works; never more than two windows in memory."""

    def __init__(self, data: PhotoFolderDataModule) -> None:
        self._data = data
        self._rows = windows(len(data.paths), data.max_views, data.overlap)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[MultiViewBatch]:
        names = [[self._data.paths[row] for row in rows] for rows in self._rows]
        with ThreadPoolExecutor(self._data.num_threads) as pool:
            waiting: deque[list[Future[PhotoView | None]]] = deque()
            for number, window in enumerate(names):
                ahead = names[number : number + 2][len(waiting) :]
                waiting += [[pool.submit(self._data.load, path) for path in paths] for paths in ahead]
                views = [future.result() for future in waiting.popleft()]
                read = [(path, view) for path, view in zip(window, views, strict=True) if view is not None]
                if read:
                    yield views_batch(*zip(*read, strict=True))  # type: ignore[arg-type]
