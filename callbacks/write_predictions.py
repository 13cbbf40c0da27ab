"""Predictions of a folder of images: two tables and a picture."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from callbacks.log_predictions import to_uint8
from restrike.viz import Prediction, contact_sheet


class WritePredictions(BasePredictionWriter):
    """Writes what a classifier says of each image into the run folder.

    `predictions.csv` has a row for each of an image's most probable classes, `predictions.json` the same nested by
    image, `predictions.png` the first images with their most probable class. The table is written batch by batch, so
    nothing but the picture's images is kept in memory. On several ranks each writes files of its own
    (`predictions.<rank>.csv` …).

    Args:
        name: Of the table; the other two have its stem.
        num_images: Images on the contact sheet; 0 for none.
        tile: Side of an image on the sheet, in pixels.
    """

    def __init__(self, name: str = "predictions.csv", num_images: int = 48, tile: int = 128) -> None:
        super().__init__(write_interval="batch")
        self.name, self.num_images, self.tile = name, num_images, tile
        self._path: Path | None = None
        self._shown: list[Prediction] = []
        self._num_written = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new table."""
        name = Path(self.name)
        if trainer.world_size > 1:
            name = name.with_suffix(f".{trainer.global_rank}{name.suffix}")
        self._path, self._shown, self._num_written = Path(trainer.default_root_dir) / name, [], 0
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
        rows = list(zip(prediction["keys"], *found, strict=True))
        self._num_written += len(rows)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for key, classes, probabilities in rows:
                for rank, (index, probability) in enumerate(zip(classes, probabilities, strict=True), start=1):
                    writer.writerow([key, rank, index, _name(names, index), f"{probability:.6f}"])
        if missing := self.num_images - len(self._shown):
            images = to_uint8(batch.images[batch.valid][:missing], trainer.datamodule)
            for image, (key, classes, probabilities) in zip(images, rows, strict=False):
                self._shown.append(Prediction(image, key, None, _name(names, classes[0]), probabilities[0]))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the other two files, and say where they are.

        Raises:
            ValueError: not one image could be read.
        """
        assert self._path is not None
        if self._num_written == 0 and trainer.world_size == 1:
            raise ValueError("no prediction was written: none of the images could be read; the log names each of them")
        _write_json(self._path)
        if self._shown:
            contact_sheet(self._shown, tile=self.tile).save(self._path.with_suffix(".png"))
        rank_zero_info(f"predictions of {self._num_written} images written to {self._path}, and beside it .json, .png")


def _name(names: Sequence[str], index: int) -> str:
    return str(names[index] if index < len(names) else index)


def _write_json(table: Path) -> None:
    """The table as a list of images, each with its classes in order; image by image, so that any number fits."""
    partial = table.with_suffix(".json.partial")
    with table.open(newline="", encoding="utf-8") as rows, partial.open("w", encoding="utf-8") as file:
        for number, entry in enumerate(_by_image(csv.DictReader(rows))):
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(entry, ensure_ascii=False))
        file.write("\n]\n" if file.tell() else "[]\n")
    os.replace(partial, table.with_suffix(".json"))


def _by_image(rows: Iterator[dict[str, str]] | csv.DictReader[str]) -> Iterator[dict[str, Any]]:
    for key, group in groupby(rows, key=lambda row: row["key"]):
        classes = [
            {"class": int(row["class"]), "class_name": row["class_name"], "probability": float(row["probability"])}
            for row in group
        ]
        yield {"key": key, "classes": classes}
