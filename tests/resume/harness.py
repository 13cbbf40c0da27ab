"""A small training run that can be killed anywhere and gone on with: what resuming has to get right is in it.

BatchNorm, dropout, AdamW, a cosine schedule that asks for `estimated_stepping_batches`, accumulation, validation,
workers. Its curve is a file of lines, written as they are logged.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import training_tools
from callbacks.batch_norm_sync import BatchNormSync
from callbacks.checkpoint import Checkpoint
from callbacks.checkpoint_io import AtomicCheckpointIO
from callbacks.ema import EMA
from callbacks.finite_guard import FiniteGuard
from callbacks.lr_scaling import LRScaling
from callbacks.mesa import MESA
from callbacks.preemption import Preemption
from callbacks.rng_state import RngState
from callbacks.staged_freezing import StagedFreezing
from callbacks.step_seed import StepSeed
from restrike.checkpoints import atomic
from restrike.data.loader import TrainLoader, WorkerOptions, create_train_loader
from restrike.data.plan import Position
from restrike.data.samples import ImageBatch
from training_tools import toy_module

NUM_SAMPLES, GLOBAL_BATCH, CLASSES = 42, 4, 3  # 10 batches an epoch; two samples are left over


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        folder: Its run folder.
        kill_at: (hook, epoch, batch) at which the process gets `kill_with`; or ("save", step of a save, which save).
        kill_rank: The rank that gets it; -1 for all.
        is_plain: Without BatchNorm and dropout, whose results depend on how a batch is cut into ranks.
        is_classifier: Restrike's own module and callbacks in place of the toy's: EMA, MESA from epoch 1 on, a stem that
            is unfrozen in epoch 2.
        poison: Numbers of samples whose images are NaN.
        monitor: Metric whose minimum is the best.
        more: Callbacks by class and arguments, before those of every run.
    """

    folder: Path
    epochs: int = 2
    accumulate: int = 1
    workers: int = 0
    val_check_interval: float = 1.0
    limit_val_batches: int = 2
    every_n_train_steps: int | None = 1
    kill_at: tuple[str, int, int] | tuple[str, str, int] | None = None
    kill_with: int = signal.SIGKILL
    kill_rank: int = 0
    is_plain: bool = False
    is_classifier: bool = False
    poison: tuple[int, ...] = ()
    monitor: str = "val/loss"
    more: tuple[tuple[type[Callback], dict[str, Any]], ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)


class ToySource:
    """Images [3, 2, 2] and labels for the project's loader; each depends on its number alone."""

    class_names = [str(i) for i in range(CLASSES)]
    labels = np.arange(NUM_SAMPLES, dtype=np.int32) % CLASSES
    shard_sizes = np.ones(NUM_SAMPLES, dtype=np.int64)
    window, fingerprint = 0, "toy"

    def __len__(self) -> int:
        return NUM_SAMPLES

    def key(self, sample: int) -> str:
        return str(sample)

    def place(self, sample: int) -> str:
        return "memory"

    def read(self, sample: int) -> bytes:
        return np.random.default_rng(sample).integers(0, 256, 12, dtype=np.uint8).tobytes()

    def will_read(self, samples: np.ndarray) -> list[Any]:
        return []


def decode(data: bytes, rng: np.random.Generator) -> Tensor:
    """The image with some noise of its own and the epoch's."""
    image = np.frombuffer(data, dtype=np.uint8).reshape(3, 2, 2).astype(np.int64)
    return torch.from_numpy(np.clip(image + rng.integers(-20, 21, image.shape), 0, 255).astype(np.uint8))


class ToyData(LightningDataModule):
    """Owns the position of the project's training loader, as the project's datamodules do."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.options = WorkerOptions(num_workers=workers, start_method="fork" if workers else None)
        self.position = Position(0, 0)
        self.loader: TrainLoader | None = None

    def train_dataloader(self) -> TrainLoader:
        rank, size = self.trainer.global_rank, self.trainer.world_size
        self.loader = create_train_loader(
            ToySource(),
            decode,
            None,
            GLOBAL_BATCH // size,
            seed=7,
            rank=rank,
            world_size=size,
            position=self.position,
            options=self.options,
        )
        return self.loader

    def val_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        images, labels = torch.rand(12, 3, 2, 2, generator=generator), torch.arange(12) % CLASSES
        return DataLoader(list(zip(images, labels, strict=True)), batch_size=4, generator=torch.Generator())

    def state_dict(self) -> dict[str, int]:
        return (self.loader.position if self.loader else self.position)._asdict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = Position(**state)


class ToyModule(LightningModule):
    """A perceptron with BatchNorm and dropout."""

    def __init__(self, is_plain: bool = False, poison: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.poison = poison
        norm, dropout = (nn.Identity(), nn.Identity()) if is_plain else (nn.BatchNorm1d(16), nn.Dropout(0.2))
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), norm, nn.ReLU(), dropout, nn.Linear(16, CLASSES))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        images = batch.images / 127.5 - 1
        images[[int(key) in self.poison for key in batch.keys]] = torch.nan
        loss = nn.functional.cross_entropy(self.net(images), batch.targets)
        self.log("train/loss", loss, sync_dist=True)
        self.log("train/loss_epoch", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: ImageBatch, batch_idx: int) -> None:
        self.log("train/first_sample", float(batch.keys[0]))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        torch.rand(1)  # a validation that draws must not change what training draws
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Lines(Logger):
    """One JSON line per logged row."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    name, version = "lines", "0"  # type: ignore[assignment]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """None are kept."""


class Killer(Callback):
    """Sends this very process a signal at a given place."""

    def __init__(self, at: tuple[Any, ...], number: int, rank: int) -> None:
        self.at, self.number, self.rank = at, number, rank

    def _visit(self, trainer: Trainer, *place: Any) -> None:
        if place == tuple(self.at) and self.rank in (-1, trainer.global_rank) and not trainer.sanity_checking:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._visit(trainer, "batch start", trainer.current_epoch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._visit(trainer, "optimizer step", trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._visit(trainer, "batch end", trainer.current_epoch, batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._visit(trainer, "validation", trainer.current_epoch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._visit(trainer, "validation end", trainer.current_epoch, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._visit(trainer, "epoch end", trainer.current_epoch, 0)


def classifier_callbacks() -> list[Callback]:
    """What the recipes have."""
    return [
        MESA(1.0, start_ratio=0.0, schedule_epochs=3),
        StagedFreezing({0: ["net.conv1.*"], 2: []}),
        StepSeed(7),
        EMA(0.9),
        BatchNormSync(),
        FiniteGuard(),
        LRScaling(8, "sqrt"),
    ]


def kill_in_save(step: str, which: int) -> None:
    """SIGKILL at the named failpoint of the `which`-th save (from 0)."""
    saves = {"opened": -1}

    def failpoint(name: str) -> None:
        saves["opened"] += name == "opened"
        if name == step and saves["opened"] == which:
            os.kill(os.getpid(), signal.SIGKILL)

    atomic.failpoint = failpoint


def train(run: Run, resume: bool = False) -> None:
    """Train; with `resume` from the newest valid checkpoint, if there is one."""
    seed_everything(3)
    callbacks: list[Callback] = [kind(**arguments) for kind, arguments in run.more]
    callbacks += classifier_callbacks() if run.is_classifier else []
    callbacks += [RngState(), Preemption(every_n_steps=2)]
    callbacks += [Checkpoint(monitor=run.monitor, mode="min", every_n_train_steps=run.every_n_train_steps)]
    if run.kill_at is not None and run.kill_at[0] == "save":
        kill_in_save(*run.kill_at[1:])
    elif run.kill_at is not None:
        callbacks.insert(0, Killer(run.kill_at, run.kill_with, run.kill_rank))
    settings: dict[str, Any] = {
        "max_epochs": run.epochs,
        "accumulate_grad_batches": run.accumulate,
        "val_check_interval": run.val_check_interval,
        "limit_val_batches": run.limit_val_batches,
        "num_sanity_val_steps": 1,
    }
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        default_root_dir=run.folder,
        logger=Lines(run.folder / "curve.jsonl"),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **(settings | run.trainer),
    )
    module: Any = (
        toy_module(model_args={"drop_rate": 0.3}) if run.is_classifier else ToyModule(run.is_plain, run.poison)
    )
    data: Any = training_tools.ToyData() if run.is_classifier else ToyData(run.workers)
    found = atomic.newest_valid(run.folder / "checkpoints", "last*.ckpt") if resume else None
    trainer.fit(module, datamodule=data, ckpt_path=found, weights_only=True)
    state = {"module": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "rng": torch.rand(3)}
    if run.is_classifier:
        state["average"] = module.averaged().state_dict()
    torch.save(state, run.folder / f"end-{trainer.global_rank}.pt")


def end(folder: Path, rank: int = 0) -> dict[str, Any]:
    """What a run ended with: weights, optimiser state, and the next random numbers."""
    return torch.load(folder / f"end-{rank}.pt", weights_only=True)


def curve(folder: Path) -> dict[tuple[int, str], float]:
    """Every logged value by (step, name).

    Raises:
        AssertionError: a value was logged twice, and differently.
    """
    values: dict[tuple[int, str], float] = {}
    for line in (folder / "curve.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            earlier = values.setdefault((step, name), value)
            assert repr(earlier) == repr(value), f"{name} at step {step} was {earlier}, then {value}"  # NaN is NaN
    return values


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two nests of tensors and plain values are not equal bit by bit."""
    if isinstance(a, Tensor):
        return [] if isinstance(b, Tensor) and torch.equal(a, b) else [place]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{place}: keys {a.keys() ^ b.keys()}"]
        return [d for key in a for d in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{place}: lengths {len(a)}, {len(b)}"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{place}[{i}]")]
    return [] if a == b else [f"{place}: {a} and {b}"]
