"""A training step reads no tensor on the host, which on a GPU would wait for the device; only logging does.

What is counted is each way in which Python gets at a tensor's values. Allowed are the values of a row that is logged,
one read each, and the optimiser's own step counters, which torch keeps on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.overrides import TorchFunctionMode

import callbacks as ours
from training_tools import ToyData, toy_module, toy_trainer

READS = {
    getattr(Tensor, name): name
    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
} | {torch.nonzero: "nonzero", torch.equal: "equal", Tensor.equal: "equal", torch.allclose: "allclose"}
LOG_EVERY, ACCUMULATE, BATCHES = 4, 2, 24


class HostReads(TorchFunctionMode):
    """Notes reads, and in which batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batch: int | None = None
        self.seen: list[tuple[int, str]] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and self.batch is not None:
            frame, places = sys._getframe(1), []
            while frame is not None:
                places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                frame = frame.f_back  # type: ignore[assignment]
            if str(Path("torch", "optim")) not in places[0]:
                self.seen.append((self.batch, f"{READS[func]} from {places[:3]}"))
        return func(*args, **(kwargs or {}))


class Note(Callback):
    """Tells which batch it is, from before its first hook to after its logging."""

    def __init__(self, reads: HostReads) -> None:
        self.reads = reads

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.reads.batch = batch_idx

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reads.batch = None


def fit(folder: Path, *more: Callback) -> HostReads:
    """Two windows of accumulation for each row of the log, with all callbacks of the quickstart."""
    reads = HostReads()
    behaviours = [
        ours.MESA(0.1, start_ratio=-1.0, schedule_epochs=1),
        ours.EMA(0.98),
        ours.RngState(),
        ours.Preemption(),
        ours.LRScaling(8, "linear"),
        ours.BatchNormSync(),
        ours.ValidationGuard(),
        ours.StepSeed(),
        ours.Throughput(),
        ours.RankWatch(),
        ours.Curves(),
        ours.StagedFreezing({0: ["net.conv1.*"], 6: []}, unit="step", lr_factors={"net.fc.*": {3: 0.5}}),
        LearningRateMonitor("step"),
    ]
    trainer = toy_trainer(
        folder,
        callbacks=[Note(reads), *behaviours, *more],
        max_epochs=1,
        enable_checkpointing=True,  # Preemption counts as a checkpoint callback
        limit_val_batches=0,
        accumulate_grad_batches=ACCUMULATE,
        log_every_n_steps=LOG_EVERY,
        gradient_clip_val=1.0,
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
    )
    with reads:
        trainer.fit(toy_module(), datamodule=ToyData(order=range(BATCHES)))
    return reads


@pytest.mark.filterwarnings("ignore:.*")
def test_only_a_logged_row_is_read(tmp_path: Path) -> None:
    reads = fit(tmp_path)
    logging = {batch for batch in range(BATCHES) if (batch + 1) % (LOG_EVERY * ACCUMULATE) == 0}
    assert [place for batch, place in reads.seen if batch not in logging] == []
    logged = ("train/loss", "train/loss_ce", "train/loss_mesa", "train/grad_norm")
    for batch in logging:
        assert len([place for each, place in reads.seen if each == batch]) == len(logged), reads.seen


class Reads(Callback):
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        float(outputs["loss"])


@pytest.mark.filterwarnings("ignore:.*")
def test_a_callback_that_reads_the_loss_would_be_found(tmp_path: Path) -> None:
    assert len(fit(tmp_path, Reads()).seen) >= BATCHES


@pytest.mark.filterwarnings("ignore:.*")
def test_the_finite_guard_reads_one_value_per_optimiser_step(tmp_path: Path) -> None:
    plain, guarded = fit(tmp_path / "plain"), fit(tmp_path / "guarded", ours.FiniteGuard())
    assert len(guarded.seen) - len(plain.seen) == BATCHES // ACCUMULATE
