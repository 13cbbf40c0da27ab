"""Images per second, and where the time goes, without making the host wait for the device.

Lightning's `ThroughputMonitor` synchronises after every batch. Here clocks are read on the host alone; over a window
of many steps that is the same, because the host cannot run further ahead than the device's queue allows.
"""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs, every `log_every_n_steps` optimiser steps and as means since the last time, over all ranks:

    `throughput/images_per_s`, `throughput/step_s`, and `throughput/data_fraction`, the share of the time that the loop
    waited for its next batch. Validation does not count.
    """

    def __init__(self) -> None:
        self._reset(0)
        self._mark: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the first window."""
        self._reset(trainer.global_step)
        self._mark = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation out."""
        self._mark = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is here: what went by since the last step was waiting."""
        self._waited += self._lap()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done; log at the end of a window."""
        self._computed += self._lap()
        self._images += len(getattr(batch, "images", batch[0]))
        steps = trainer.global_step - self._first_step
        if steps == 0 or trainer.global_step % trainer.log_every_n_steps:
            return
        seconds = max(self._waited + self._computed, 1e-9)
        metrics = {
            "throughput/images_per_s": self._images * trainer.world_size / seconds,
            "throughput/step_s": seconds / steps,
            "throughput/data_fraction": self._waited / seconds,
        }
        for logger in trainer.loggers:  # straight to the loggers: `log` would move each number to the device first
            logger.log_metrics(metrics, step=trainer.global_step - 1)
        self._reset(trainer.global_step)

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self._mark = now - (self._mark or now), now
        return lap

    def _reset(self, step: int) -> None:
        self._first_step = step
        self._images = 0
        self._waited = 0.0
        self._computed = 0.0
