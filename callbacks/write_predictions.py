"""Predictions of a folder of images as a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info


class WritePredictions(BasePredictionWriter):
    """Writes `predictions.csv` into the run folder: key, and the most probable classes with their probabilities.

    Each batch is written as it comes, so nothing is kept in memory. On several ranks each writes its own
    `predictions.<rank>.csv`.

    Args:
        name: Of the table.
    """

    def __init__(self, name: str = "predictions.csv") -> None:
        super().__init__(write_interval="batch")
        self.name = name
        self._path: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new table."""
        name = Path(self.name)
        if trainer.world_size > 1:
            name = name.with_suffix(f".{trainer.global_rank}{name.suffix}")
        self._path = Path(trainer.default_root_dir) / name
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(["key", "rank", "class", "class_name", "probability"])

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Add the rows of one batch."""
        assert self._path is not None
        names = getattr(trainer.datamodule, "class_names", [])
        found = prediction["classes"].tolist(), prediction["probabilities"].tolist()
        rows = zip(prediction["keys"], *found, strict=True)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for key, classes, probabilities in rows:
                for rank, (index, probability) in enumerate(zip(classes, probabilities, strict=True), start=1):
                    name = names[index] if index < len(names) else index
                    writer.writerow([key, rank, index, name, f"{probability:.6f}"])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the table is."""
        rank_zero_info(f"predictions written to {self._path}")
