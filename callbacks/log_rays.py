"""Pictures of what DiffusionSfM says of held-out scenes: their rays, beside the true ones."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.log_predictions import to_uint8
from callbacks.pictures import log_picture
from restrike.viz.rays import ray_sheet


class LogRays(Callback):
    """Writes a sheet per scene to `<run>/rays/` after each validation, on rank 0 alone; loggers that take images too.

    `validation_step` must return a dict with "batch", "rays" and "true_rays", or an empty one.

    Args:
        num_scenes: Of the first batch.
        tile: Side of a picture, pixels.
    """

    def __init__(self, num_scenes: int = 2, tile: int = 96) -> None:
        if num_scenes < 1:
            raise ValueError(f"callbacks.rays.num_scenes: expected 1 or more, got {num_scenes}")
        self.num_scenes, self.tile = num_scenes, tile

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch."""
        if batch_idx or "rays" not in (outputs or {}) or not trainer.is_global_zero or trainer.sanity_checking:
            return
        kept, datamodule = outputs["batch"], trainer.datamodule  # type: ignore[attr-defined]
        for row, key in enumerate(kept.keys[: self.num_scenes]):
            images = to_uint8(kept.images[row], datamodule)
            sheet = ray_sheet(images, outputs["rays"][row], outputs["true_rays"][row], self.tile)
            log_picture(trainer, sheet, "rays", f"step_{trainer.global_step:07d}_{key}", str(row))
