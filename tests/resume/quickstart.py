"""The quickstart's own recipe over the command line, shortened, and killed at given places one start after another."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from cli.__main__ import main
from restrike.viz.curves import Curve, join_metrics

ROOT = Path(__file__).resolve().parents[2]
OF_TIME = ("throughput/", "memory/")  # what is measured of the machine, not of the training

# 22 batches an epoch, 11 optimiser steps; MESA from epoch 1 on; the patch embedding is unfrozen in epoch 2.
SHORT = [
    "--trainer.max_epochs=3",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.log_every_n_steps=1",
    "--model.warmup_epochs=1",
    "--callbacks.checkpoint.every_n_train_steps=3",
    "--callbacks.freeze=callbacks.StagedFreezing",
    '--callbacks.freeze.stages={"0": ["net.patch_embed.*"], "2": []}',
    '--callbacks.freeze.lr_factors={"net.patch_embed.*": {"2": 0.5}}',
    "--callbacks.progress=null",
    "--callbacks.curves=null",
    "--callbacks.predictions=null",
    "--allow_class_path=resume",
]
BATCHES = 22

# (hook, epoch, batch) at which a process is killed
PLACES: dict[str, tuple[str, int, int]] = {
    "inside an accumulation window": ("batch end", 0, 8),
    "between a window's gradients and its step": ("optimizer step", 0, 13),
    "at the last step before a validation": ("batch end", 0, BATCHES - 1),
    "within a validation": ("validation", 0, 1),
    "just after a validation": ("validation end", 0, 0),
    "at an epoch's end": ("epoch end", 0, 0),
    "as MESA starts": ("batch start", 1, 0),
    "inside a window after MESA's start": ("batch start", 1, 5),
    "as the patch embedding is unfrozen": ("batch start", 2, 0),
    "after the patch embedding was unfrozen": ("batch end", 2, 9),
    "at the end of the run": ("epoch end", 2, 0),
}


class Witness(Callback):
    """Kills this process at a place, and otherwise keeps what the run ended with."""

    def __init__(self, place: str | None = None) -> None:
        self.at = PLACES[place] if place else None

    def _visit(self, trainer: Trainer, hook: str, batch: int) -> None:
        if not trainer.sanity_checking and (hook, trainer.current_epoch, batch) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._visit(trainer, "batch start", batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._visit(trainer, "optimizer step", trainer.fit_loop.epoch_loop.batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._visit(trainer, "batch end", batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._visit(trainer, "validation", batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._visit(trainer, "validation end", 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._visit(trainer, "epoch end", 0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end = {
            "module": pl_module.state_dict(),
            "average": pl_module.averaged().state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "step": trainer.global_step,
            "rng": torch.rand(3),
        }
        torch.save(end, Path(trainer.default_root_dir) / "end.pt")


def prepare(data: Path) -> None:
    """Pack the digits."""
    raise SystemExit(main(["prepare", "digits", "--out", str(data)]))


def fit(folder: Path, data: Path, place: str | None, *options: str) -> None:
    """One start of the run in `folder`."""
    line = ["fit", "--config", str(ROOT / "conf" / "quickstart.yaml"), *SHORT, f"--data.data={data}"]
    line += [f"--run_dir={folder}", "--callbacks.witness=resume.quickstart.Witness", *options]
    line += [f"--callbacks.witness.place={place}"] if place else []
    raise SystemExit(main(line))


def curves(folder: Path) -> dict[str, Curve]:
    """What all starts have logged, joined as the project's picture of the curves joins it."""
    folders = sorted((folder / "metrics").glob("version_*"), key=lambda each: int(each.name.rpartition("_")[2]))
    joined = join_metrics([each / "metrics.csv" for each in folders if (each / "metrics.csv").is_file()])
    return {name: curve for name, curve in joined.items() if not name.startswith(OF_TIME)}
