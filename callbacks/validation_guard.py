"""Stop a run that has failed, as the FasterViT release does, instead of spending days on it."""

from __future__ import annotations

import math

from lightning.pytorch import Callback, LightningModule, Trainer


class TrainingDivergedError(RuntimeError):
    """The network is beyond repair: validation says so."""


class ValidationGuard(Callback):
    """Ends the run with an error when a validation loss is not finite, or top-1 stays below a floor.

    Args:
        min_top1: Floor of `val/top1` from `from_epoch` on, in [0, 1]. FasterViT's release uses 0.01, which also ends
            short runs with few images; 0 is off.
        from_epoch: First epoch, from 0, to which the floor applies.
    """

    def __init__(self, min_top1: float = 0.0, from_epoch: int = 1) -> None:
        self.min_top1 = min_top1
        self.from_epoch = from_epoch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the metrics of the validation that has just ended."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        where = f"after epoch {trainer.current_epoch}, step {trainer.global_step}"
        for name in ("val/loss", "val/loss_ema"):
            if name in metrics and not math.isfinite(metrics[name]):
                raise TrainingDivergedError(
                    f"{name} is {float(metrics[name])} {where}: lower model.lr, lengthen the warm-up, or look at "
                    "train/grad_norm; an earlier checkpoint may be sound"
                )
        top1 = metrics.get("val/top1")
        if top1 is not None and trainer.current_epoch >= self.from_epoch and top1 < self.min_top1:
            raise TrainingDivergedError(
                f"val/top1 is {float(top1):.4f} {where}, below callbacks.validation_guard.min_top1={self.min_top1}: is "
                "the learning rate too high for this batch (callbacks.lr_scaling)?"
            )
