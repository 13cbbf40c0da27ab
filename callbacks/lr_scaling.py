"""The learning rate follows the batch that the run really has."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.protocols import HasBatchSize, ScalesLearningRate, require
from restrike.optim import scale_factor
from restrike.optim.batch_scaling import ScalingRule


class LRScaling(Callback):
    """Sets `module.lr_factor` from samples per optimiser step: ranks × batch_size_per_device × accumulated batches.

    The factor multiplies the whole schedule, warm-up and minimum included. A resumed run takes its rates from the
    checkpoint, where a new batch would not be seen; so a change of the effective batch stops it.

    Args:
        reference_batch_size: Samples per optimiser step that `model.lr` was chosen for.
        rule: "none", "linear" or "sqrt".
        allow_batch_change: Resume with another effective batch all the same.
    """

    def __init__(self, reference_batch_size: int, rule: ScalingRule = "none", allow_batch_change: bool = False) -> None:
        scale_factor(rule, 1, reference_batch_size)  # an unknown rule is an error now, not after the data is set up
        self.reference_batch_size = reference_batch_size
        self.rule = rule
        self.allow_batch_change = allow_batch_change
        self.effective_batch_size: int | None = None
        self._saved: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before `configure_optimizers`: schedulers copy their base rates there."""
        if stage != "fit":
            return
        require(pl_module, ScalesLearningRate, "lr_scaling")
        require(trainer.datamodule, HasBatchSize, "lr_scaling")
        per_device = trainer.datamodule.batch_size_per_device
        self.effective_batch_size = trainer.world_size * per_device * trainer.accumulate_grad_batches
        pl_module.lr_factor = scale_factor(self.rule, self.effective_batch_size, self.reference_batch_size)
        rank_zero_info(
            f"LR scaling '{self.rule}': effective batch {self.effective_batch_size} = {trainer.world_size} ranks x "
            f"{per_device} x {trainer.accumulate_grad_batches} accumulated, reference {self.reference_batch_size}, "
            f"factor {pl_module.lr_factor:.6g}"
        )
        record = {
            "lr_scaling/reference_batch_size": self.reference_batch_size,
            "lr_scaling/effective_batch_size": self.effective_batch_size,
            "lr_scaling/factor": pl_module.lr_factor,
        }
        for logger in trainer.loggers:
            logger.log_hyperparams(record)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the run that is being resumed."""
        if self._saved in (None, self.effective_batch_size) or self.allow_batch_change:
            return
        raise ValueError(
            f"this run was started with {self._saved} samples per optimiser step and would resume with "
            f"{self.effective_batch_size}, at the old learning rates: adjust data.batch_size_per_device or "
            "trainer.accumulate_grad_batches, or set callbacks.lr_scaling.allow_batch_change=true"
        )

    def state_dict(self) -> dict[str, Any]:
        """The effective batch."""
        return {"effective_batch_size": self.effective_batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the checkpoint's run had."""
        self._saved = state_dict["effective_batch_size"]
