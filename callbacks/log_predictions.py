"""A picture of what the network says about held-out images."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.pictures import log_picture
from callbacks.protocols import ShowsImages, require
from restrike.viz import Prediction, contact_sheet


class LogPredictions(Callback):
    """Writes a contact sheet to `<run>/predictions/` after each validation and test, on rank 0 alone.

    The images are spread evenly over the split, and the same ones every time. Loggers that take images get the sheet
    too. `validation_step` and `test_step` must return a dict with "logits".

    Args:
        num_images: Images on the sheet.
        every_n_epochs: Skip the validations of other epochs.
        tile: Side of an image on the sheet, in pixels.
    """

    def __init__(self, num_images: int = 24, every_n_epochs: int = 1, tile: int = 128) -> None:
        if num_images < 1 or every_n_epochs < 1:
            raise ValueError("expected num_images and every_n_epochs of callbacks.log_predictions to be at least 1")
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.tile = tile
        self._predictions: list[Prediction] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data that cannot be shown."""
        if stage != "predict":
            require(trainer.datamodule, ShowsImages, "log_predictions")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a few rows."""
        if not trainer.sanity_checking and trainer.current_epoch % self.every_n_epochs == 0:
            self._collect(trainer, outputs, batch, batch_idx, int(trainer.num_val_batches[0]))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a few rows."""
        self._collect(trainer, outputs, batch, batch_idx, int(trainer.num_test_batches[0]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._draw(trainer, f"val_step_{trainer.global_step:07d}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._draw(trainer, "test")

    @torch.no_grad()
    def _collect(self, trainer: Trainer, outputs: Any, batch: Any, batch_idx: int, num_batches: int) -> None:
        """Rows of every batch if there are fewer batches than images, else of every n-th batch."""
        stride = max(1, num_batches // self.num_images)
        missing = self.num_images - len(self._predictions)
        if not trainer.is_global_zero or batch_idx % stride or missing <= 0:
            return
        rows = torch.nonzero(batch.valid.cpu()).flatten()
        share = min(missing, -(-self.num_images // num_batches), len(rows))
        rows = rows[torch.linspace(0, len(rows) - 1, share).round().long()] if share else rows[:0]
        on_device = rows.to(batch.images.device)
        probabilities = outputs["logits"][on_device].float().softmax(dim=1)
        confidence, predicted = probabilities.max(dim=1)
        images = to_uint8(batch.images[on_device], trainer.datamodule)
        names = trainer.datamodule.class_names
        for row, image, truth, guess, sure in zip(
            rows.tolist(),
            images,
            batch.targets[on_device].tolist(),
            predicted.tolist(),
            confidence.tolist(),
            strict=True,
        ):
            self._predictions.append(Prediction(image, batch.keys[row], names[truth], names[guess], sure))

    def _draw(self, trainer: Trainer, name: str) -> None:
        predictions, self._predictions = self._predictions, []
        if not predictions:
            return
        sheet = contact_sheet(predictions, tile=self.tile)
        log_picture(trainer, sheet, "predictions", name, name.partition("_")[0])


def to_uint8(images: Tensor, datamodule: Any) -> Tensor:
    """Undo the normalisation: uint8 [N, 3, H, W] on the CPU."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (datamodule.mean, datamodule.std))
    pixels = (images.float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8)
