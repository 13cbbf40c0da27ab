"""What a worker does: turn a request for a step into a batch. Bad samples are reported and replaced, never dropped.

Workers hold no state between requests, so a batch depends on its request alone: not on the number of workers, on
what came before, or on a resume.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from restrike.data.decode import DecodeError
from restrike.data.randomness import Purpose, device_seed, stream
from restrike.data.samples import ImageBatch
from restrike.data.source import BadSampleError, ImageSource, label_of
from restrike.data.transforms import stack_images

_LOG = logging.getLogger(__name__)

TrainImage = Callable[[bytes, np.random.Generator], Tensor]  # file → uint8 [3, H, W]
EvalImage = Callable[[bytes], Tensor]
Mix = Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]]


class TooManyBadSamplesError(ValueError):
    """More images could not be used than the configuration allows."""


class BadSample(NamedTuple):
    """An image that could not be used, where it lies, and why."""

    key: str
    place: str
    reason: str

    def __str__(self) -> str:
        return f"'{self.key}' in {self.place}: {self.reason}"


class Request(NamedTuple):
    """One step of one rank: sample numbers int64 [B]; -1 = padding row (evaluation only)."""

    epoch: int
    step: int
    ids: np.ndarray


class LoadedBatch(NamedTuple):
    """A batch and the samples that were replaced (training) or masked (evaluation) in it.

    `batch` is None where the bad samples of this batch alone are more than allowed. The main process raises then: an
    exception from a worker would arrive wrapped in a page of traceback.
    """

    epoch: int
    batch: ImageBatch | None
    bad: list[BadSample]


class TrainBatches(Dataset[LoadedBatch]):
    """Training batches by request.

    A sample that cannot be used is replaced by the next one in storage order (wrapping), so that steps stay equal on
    all ranks.

    Args:
        source: the images.
        transform: decode and augment; draws from the generator that it is given.
        mixing: on the uint8 batch; None = class indices as targets.
        seed: of all augmentation.
        rank: mixing draws one λ and box for each rank's batch.
        max_bad_samples: gives up within one batch after that many; the loader bounds a whole epoch.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: TrainImage,
        mixing: Mix | None,
        seed: int,
        rank: int = 0,
        max_bad_samples: int = 0,
    ) -> None:
        self.source, self.transform, self.mixing = source, transform, mixing
        self.seed, self.rank, self.max_bad_samples = seed, rank, max_bad_samples

    def __getitem__(self, request: Request) -> LoadedBatch:
        bad: list[BadSample] = []
        rows = []
        for sample in request.ids.tolist():
            row = self._usable(sample, request.epoch, bad)
            if row is None:
                return LoadedBatch(request.epoch, None, bad)
            rows.append(row)
        images = stack_images([image for image, _, _ in rows])
        targets = torch.tensor([label for _, label, _ in rows], dtype=torch.int64)
        if self.mixing is not None:
            random = stream(self.seed, Purpose.MIXING, request.epoch, request.step, self.rank)
            images, targets = self.mixing(images, targets, random)
        valid = torch.ones(len(rows), dtype=torch.bool)
        seed = device_seed(self.seed, request.epoch, request.step, self.rank)
        return LoadedBatch(request.epoch, ImageBatch(images, targets, valid, [key for _, _, key in rows], seed), bad)

    def _usable(self, sample: int, epoch: int, bad: list[BadSample]) -> tuple[Tensor, int, str] | None:
        """The sample, or the first usable one after it; None after too many bad ones."""
        while len(bad) <= self.max_bad_samples:
            key = self.source.key(sample)
            try:
                label = label_of(self.source, sample)
                image = self.transform(self.source.read(sample), stream(self.seed, Purpose.SAMPLE, epoch, sample))
                return image, label, key
            except (BadSampleError, DecodeError) as error:
                bad.append(BadSample(key, self.source.place(sample), str(error)))
            sample = (sample + 1) % len(self.source)
        return None


class EvalBatches(Dataset[LoadedBatch]):
    """Evaluation batches by request: each requested sample once; padding and (if allowed) bad ones are masked.

    Args:
        source: the images.
        transform: decode, resize, crop.
        image_size: pixels of a padding row's side.
        labelled: whether an unknown or impossible label is an error.
        max_bad_samples: 0 = the first bad sample ends the run.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: EvalImage,
        image_size: int,
        labelled: bool = True,
        max_bad_samples: int = 0,
    ) -> None:
        self.source, self.transform, self.image_size = source, transform, image_size
        self.labelled, self.max_bad_samples = labelled, max_bad_samples

    def __getitem__(self, request: Request) -> LoadedBatch:
        size = len(request.ids)
        images = torch.zeros(size, 3, self.image_size, self.image_size, dtype=torch.uint8)
        targets = torch.zeros(size, dtype=torch.int64)
        valid = torch.zeros(size, dtype=torch.bool)
        keys = [""] * size
        bad: list[BadSample] = []
        for row, sample in enumerate(request.ids.tolist()):
            if sample < 0:
                continue
            keys[row] = self.source.key(sample)
            try:
                targets[row] = label_of(self.source, sample) if self.labelled else int(self.source.labels[sample])
                images[row] = self.transform(self.source.read(sample))
                valid[row] = True
            except (BadSampleError, DecodeError) as error:
                bad.append(BadSample(keys[row], self.source.place(sample), str(error)))
                targets[row] = 0
                if len(bad) > self.max_bad_samples:
                    return LoadedBatch(request.epoch, None, bad)
        return LoadedBatch(request.epoch, ImageBatch(images, targets, valid, keys, 0), bad)


class BadSampleCount:
    """Bad samples of a rank's epoch, counted over its workers. Each is logged; beyond the bound the run ends.

    Attributes:
        count: in this epoch, or since the last `reset`.
    """

    def __init__(self, max_bad_samples: int) -> None:
        self.max_bad_samples, self.count, self._epoch = max_bad_samples, 0, 0

    def reset(self) -> None:
        """For a loader whose passes have no number."""
        self.count = 0

    def checked(self, loaded: LoadedBatch) -> ImageBatch:
        """The batch, once its bad samples are counted.

        Raises:
            TooManyBadSamplesError: names the last one.
        """
        if loaded.epoch != self._epoch:
            self.count, self._epoch = 0, loaded.epoch
        bad = loaded.bad
        for sample in bad:
            _LOG.warning("bad sample %s", sample)
        self.count += len(bad)
        if self.count > self.max_bad_samples:
            raise TooManyBadSamplesError(
                f"more than max_bad_samples = {self.max_bad_samples} images cannot be used; the last: {bad[-1]}. "
                "Mend the data (`python -m cli prepare verify` finds damaged shards) or raise the bound"
            )
        assert loaded.batch is not None, "a batch is withheld only after too many bad samples"
        return loaded.batch
