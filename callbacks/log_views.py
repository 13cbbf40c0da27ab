"""Pictures of what a multi-view network says of held-out scenes: depth, points and cameras, beside the true ones."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.log_predictions import to_uint8
from callbacks.pictures import log_picture
from restrike.data.predicted_views import crop_pixel_intrinsics
from restrike.viz.compared_views import compare_views
from restrike.viz.scene import SceneViews


class LogViews(Callback):
    """Writes a sheet a scene to `<run>/predictions/` after each validation and test, on rank 0; to loggers, too.

    Scenes are the first of rank 0's first batch, the same ones each time. For that batch `validation_step` and
    `test_step` must return a dict with "batch" and "views" (`PredictedViews`), perhaps with "points_world"
    [B, V, P, Q, 3] in the first camera; a step that returns none has no picture.

    Args:
        num_scenes: At most so many.
        max_views: Of a scene; more are thinned evenly.
        every_n_epochs: Skip the validations of other epochs.
        tile: Side of a panel, pixels.
    """

    def __init__(self, num_scenes: int = 2, max_views: int = 6, every_n_epochs: int = 1, tile: int = 112) -> None:
        if min(num_scenes, max_views, every_n_epochs) < 1:
            raise ValueError("callbacks.views: expected num_scenes, max_views and every_n_epochs of at least 1")
        self.num_scenes, self.max_views = num_scenes, max_views
        self.every_n_epochs, self.tile = every_n_epochs, tile

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
        if not trainer.sanity_checking and trainer.current_epoch % self.every_n_epochs == 0:
            self._draw(trainer, outputs, batch_idx, "val", f"val_step_{trainer.global_step:07d}")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch."""
        self._draw(trainer, outputs, batch_idx, "test", "test")

    @torch.no_grad()
    def _draw(self, trainer: Trainer, outputs: Any, batch_idx: int, stage: str, name: str) -> None:
        if batch_idx or not trainer.is_global_zero or not outputs or not {"batch", "views"} <= outputs.keys():
            return
        for row, key in enumerate(outputs["batch"].keys[: self.num_scenes]):
            true, predicted, points = self._scene(outputs, row, trainer.datamodule)  # type: ignore[attr-defined]
            sheet = compare_views(true, predicted, points, self.tile)
            log_picture(trainer, sheet, "predictions", f"{name}_{key}", f"{stage}_{row}")

    def _scene(self, outputs: Any, row: int, datamodule: Any) -> tuple[SceneViews, SceneViews, torch.Tensor | None]:
        """Truth and prediction of a scene's chosen views, on the CPU."""
        batch, views = outputs["batch"], outputs["views"]
        count = batch.images.shape[1]
        chosen = torch.linspace(0, count - 1, min(count, self.max_views)).round().long()
        images, title = to_uint8(batch.images[row].cpu()[chosen], datamodule), batch.keys[row]
        labels = [f"frame {number}" for number in batch.frame_numbers[row].cpu()[chosen].tolist()]

        def part(x: torch.Tensor) -> torch.Tensor:
            return x[row].detach().float().cpu()[chosen]

        known = batch.valid_depth & (batch.depth > 0) & batch.depth.isfinite()
        true_depth = part(torch.where(known, batch.depth, 0.0))
        size = images.shape[-2], images.shape[-1]
        intrinsics = crop_pixel_intrinsics(part(views.intrinsics), part(batch.crop_boxes), size)
        points = outputs.get("points_world")
        return (
            SceneViews(title, labels, images, true_depth, part(batch.intrinsics), part(batch.world_to_camera)),
            SceneViews(title, labels, images, part(views.depth), intrinsics, part(views.world_to_camera)),
            None if points is None else part(points),
        )
