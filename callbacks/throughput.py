"""Images per second, where the time goes, and memory, without making the host wait for the device.

Lightning's `ThroughputMonitor` synchronises after every batch. Here clocks are read on the host alone; over a window
of many steps that is the same, because the host cannot run further ahead than the device's queue allows.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

_GIB = 1 << 30
_STATM = Path("/proc/self/statm")  # Linux: sizes in pages
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Throughput(Callback):
    """Logs, every `log_every_n_steps` optimiser steps and as means since the last time, over all ranks:

    `throughput/images_per_s`, `throughput/step_s`, and `throughput/data_fraction`, the share of the time that the loop
    waited for its next batch. Validation does not count.

    Memory of rank 0, where it can be known: `memory/host_gib`, resident now (without loader workers), and
    `memory/device_peak_gib`, the most that tensors have taken on a CUDA device since the last time.
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
            **_memory(pl_module.device),
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


def _memory(device: torch.device) -> dict[str, float]:
    """Read from counters that the host keeps, and start the next peak."""
    memory = {}
    if _STATM.is_file():
        memory["memory/host_gib"] = int(_STATM.read_text().split()[1]) * _PAGE / _GIB
    if device.type == "cuda":
        memory["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
        torch.cuda.reset_peak_memory_stats(device)
    return memory
