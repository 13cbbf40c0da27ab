"""How long a config's run is and what its data asks of the loaders, as far as that is known without the data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from callbacks import MESA, StagedFreezing
from restrike.plan.estimate import IMAGES, Loading
from restrike.plan.shapes import mean_scene


@dataclass(frozen=True)
class _KnownSet:
    name: str
    samples: int
    folder: str | None = None  # the last part of data.data, where the number of classes says too little


# Training images of sets, by number of classes: used, and said, where the data is not here.
_KNOWN_SETS = {
    1000: _KnownSet("ImageNet-1k", 1_281_167),
    21841: _KnownSet("ImageNet-21k", 14_197_122),
    200: _KnownSet("CUB-200-2011", 5_994),
    10: _KnownSet("digits", 1_437, "digits"),
    16: _KnownSet("photos", 1_600, "photos"),
}
_UNKNOWN_EPOCH = 1000  # batches, where only shares of a run count
# Pixels that a core makes of stored views in a second: docs/benchmarks.md, "CO3D scene of 8 views", at each family's
# profile. Other sizes are taken to cost the same a pixel.
_PIXELS_PER_CORE_S = {"DiffusionSfMViews": 39.8 * 8 * 224 * 224, "VGGTViews": 9.98 * 8 * 518 * 350}
_PIXELS_PER_CORE_S["CUT3RViews"] = 7.83 * 8 * 512 * 384
# Of a view with depth and mask in a set of profile S and of profile L (docs/co3d.md).
_VIEW_BYTES = {"S": 140_000.0, "L": 330_000.0}
_LARGEST_OF_S = 384


@dataclass(frozen=True)
class RunPhase:
    """Optimiser steps from `start` on in which the same parameters train under the same loss; `steps` None: unknown."""

    start: int
    epoch: int
    steps: int | None


class RunLength:
    """Optimiser steps of a run, and where a callback changes what they cost.

    Args:
        config: A parsed fit config.
        data: Its datamodule.
        ranks: Processes.
        samples: Training samples an epoch; None asks the data.
    """

    def __init__(self, config: Any, data: Any, ranks: int, samples: int | None) -> None:
        self._trainer, self._data, self._ranks = config.trainer, data, ranks
        self._folder = Path(str(config.data.init_args.get("data", ""))).name
        self.notes: list[str] = []
        self.batches_per_epoch = self._count_batches(samples)
        self.epochs: int | None = config.trainer.max_epochs
        batches = self.batches_per_epoch or _UNKNOWN_EPOCH
        self.steps_per_epoch = math.ceil(batches / config.trainer.accumulate_grad_batches)
        self.total = self._total()
        if self.total is None:
            self.notes.append("the data is not here, and its size unknown: --samples N gives hours")

    def phases(self, freezing: StagedFreezing | None, mesa: MESA | None) -> list[RunPhase]:
        """In order; one where nothing changes."""
        marks = sorted({0, *self._stage_starts(freezing), *self._mesa_starts(mesa)})
        marks = [mark for mark in marks if self.total is None or mark < self.total]
        ends = [*marks[1:], self.total]
        return [
            RunPhase(start, start // self.steps_per_epoch, None if self.total is None or end is None else end - start)
            for start, end in zip(marks, ends, strict=True)
        ]

    def _stage_starts(self, freezing: StagedFreezing | None) -> Iterator[int]:
        if freezing is not None:
            yield from (s * (self.steps_per_epoch if freezing.unit == "epoch" else 1) for s in freezing.stages)

    def _mesa_starts(self, mesa: MESA | None) -> Iterator[int]:
        for epoch in range(1, (self.epochs or 0) if mesa is not None else 0):
            if mesa.is_active(epoch) != mesa.is_active(epoch - 1):  # type: ignore[union-attr]
                yield epoch * self.steps_per_epoch

    def _total(self) -> int | None:
        trainer = self._trainer
        limits = [] if trainer.max_steps <= 0 else [trainer.max_steps]
        if self.batches_per_epoch is not None and self.epochs and self.epochs > 0:
            limits.append(self.epochs * self.steps_per_epoch)
        return min(limits, default=None)

    def _count_batches(self, samples: int | None) -> int | None:
        """Batches that a rank sees in an epoch."""
        per_step = self._data.batch_size_per_device * self._ranks
        batches = self._batches_of_data(per_step) if samples is None else samples // per_step
        limit = self._trainer.limit_train_batches
        if isinstance(limit, int) and batches is None:
            return limit
        if batches is None:
            return None
        if limit is None or (limit == 1.0 and isinstance(limit, float)):
            return max(1, batches)
        return max(1, int(batches * limit) if isinstance(limit, float) else min(batches, int(limit)))

    def _batches_of_data(self, per_step: int) -> int | None:
        """Of the data where it is here; else of what the recipe says of an epoch, or of a public set."""
        data = self._data
        data.trainer = SimpleNamespace(world_size=self._ranks, global_rank=0, current_epoch=0, overfit_batches=0,
                                       is_global_zero=False)  # fmt: skip
        try:
            data.setup("fit")
            return len(data.train_dataloader())
        except (ValueError, OSError):
            pass
        finally:
            data.trainer = None
        if getattr(data, "steps_per_epoch", None) is not None:
            return int(data.steps_per_epoch)
        if getattr(data, "epoch_length", None) is not None:
            return max(1, data.epoch_length // per_step)
        known = _KNOWN_SETS.get(getattr(data, "num_classes", -1))
        if known is None or (known.folder is not None and known.folder != self._folder):
            return None
        self.notes.append(f"the data is not here: {known.name}'s {known.samples:,} training images are assumed")
        return known.samples // per_step


def loading_of(data: Any, samples_per_core_s: float | None) -> Loading:
    """Of a datamodule's samples; the rate may be given."""
    if not hasattr(data, "shape"):
        return Loading(samples_per_core_s or IMAGES.samples_per_core_s, IMAGES.bytes_per_sample)
    views, pixels = mean_scene(data.shape)
    rate = _PIXELS_PER_CORE_S.get(type(data.transform).__name__, min(_PIXELS_PER_CORE_S.values())) / pixels
    side = max(pixels / views, 1) ** 0.5
    size = _stored_view_bytes(str(data.data)) or _VIEW_BYTES["S" if side <= _LARGEST_OF_S else "L"]
    return Loading(samples_per_core_s or rate, views * size)


def _stored_view_bytes(folder: str) -> float | None:
    """Of a packed multi-view set that is here."""
    try:
        catalogue = json.loads((Path(folder) / "catalogue.json").read_text())
        return sum(shard["bytes"] for shard in catalogue["shards"]) / catalogue["frames"]
    except (OSError, ValueError, KeyError, ZeroDivisionError):
        return None
