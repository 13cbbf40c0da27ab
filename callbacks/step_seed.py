"""Dropout and drop-path masks as a pure function of (seed, epoch, batch, rank)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seeds torch before every training batch.

    Lightning gives every rank the same seed, so all ranks would drop the same paths. With this they differ, and a run
    that resumes anywhere draws the masks that it would have drawn.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the generators of the CPU and of the device; neither waits for the device."""
        sequence = np.random.SeedSequence([self.seed, trainer.current_epoch, batch_idx, trainer.global_rank])
        seed = int(sequence.generate_state(1, np.uint64)[0])
        if pl_module.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # the same stream, without a look at every kind of accelerator
        else:
            torch.manual_seed(seed)
