"""Which checkpoints a run keeps: `last.ckpt`, the one before it, and the best by a metric.

Lightning's `ModelCheckpoint` renews `last.ckpt` only when the best changes, cannot combine a step interval with a
monitored metric, and, asked to save at a step after which a validation or an epoch's end comes, leaves a file from
which that validation never happens. This one saves at the first moment from which nothing is missed.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.step_boundary import ends_epoch, may_save, validation_follows
from restrike.checkpoints import atomic


class Checkpoint(ModelCheckpoint):
    """Saves at the end of epochs, at optimiser steps between them, and when a metric improves.

    A file that is both the best and the last is written once. An old best is removed only when the new one is on the
    disk. Paths in the state are relative, so a run folder that was moved goes on in its new place.

    Lightning logs a step after this hook: a kill in the moment between costs that row of the log, never the step.

    Args:
        dirpath: Folder, relative to the trainer's root folder unless absolute or a URL.
        monitor: Logged metric whose best value decides about `best-*.ckpt`; null keeps none.
        mode: Whether "max" or "min" of it is best.
        save_top_k: How many best files to keep.
        every_n_train_steps: Also renew `last.ckpt` every so many optimiser steps; null is off.
        every_n_epochs: Renew `last.ckpt` at the end of every so many epochs.
        filename: Names of best files, as in `ModelCheckpoint`. They have to begin with "best".
    """

    def __init__(
        self,
        dirpath: str = "checkpoints",
        monitor: str | None = None,
        mode: str = "max",
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
        every_n_epochs: int = 1,
        filename: str = "best-epoch{epoch:04d}-step{step:08d}",
    ) -> None:
        if not filename.startswith("best"):
            raise ValueError(f"callbacks.checkpoint.filename must begin with 'best', got '{filename}'")
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"callbacks.checkpoint.every_n_train_steps must be at least 1, got {every_n_train_steps}")
        super().__init__(
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k if monitor else 0,
            save_last=True,
            auto_insert_metric_name=False,  # metric names hold slashes
            every_n_epochs=every_n_epochs,
            enable_version_counter=False,  # a repeated epoch overwrites its file
        )
        self.folder = dirpath
        self.every_n_train_steps = every_n_train_steps
        self._step = 0  # optimiser steps so far
        self._last_is_due = False  # a step's save, put off to the end of a validation or epoch
        self._is_fresh = False  # a validation has run since the metric was last judged
        self._just_saved = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and clear it of what killed saves left."""
        if self.dirpath is None:
            self.dirpath = os.path.join(trainer.default_root_dir, self.folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # a resumed run's is
            super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and "://" not in str(self.dirpath):
            atomic.remove_stale(self.dirpath)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the (resumed) run stands."""
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every so many optimiser steps, never inside an accumulation window."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self.every_n_train_steps is None or self._step % self.every_n_train_steps or not may_save(trainer):
            return
        if ends_epoch(trainer) or validation_follows(trainer):
            self._last_is_due = True
        else:
            self._save(trainer, last=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a validation within the epoch; one at its end leaves the saving to `on_train_epoch_end`."""
        if not may_save(trainer):
            return
        self._is_fresh = True
        if not ends_epoch(trainer):
            self._save(trainer, last=self._last_is_due)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At an epoch's end, when every other callback and the module have done theirs."""
        if not may_save(trainer):
            return
        self._is_fresh |= not trainer.enable_validation  # then the metric is one of training
        self._save(trainer, last=self._last_is_due or (trainer.current_epoch + 1) % self._every_n_epochs == 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of the run is always saved."""
        if may_save(trainer) and self._last_global_step_saved != trainer.global_step:
            self._save(trainer, last=True)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state, with names in place of paths."""
        state = super().state_dict()
        del state["dirpath"]
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = os.path.basename(state[key])
        state["best_k_models"] = {os.path.basename(path): score for path, score in self.best_k_models.items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the folder back before the names."""
        state = dict(state_dict)
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = self._path(state[key])
        state["best_k_models"] = {self._path(name): score for name, score in state["best_k_models"].items()}
        super().load_state_dict({**state, "dirpath": self.dirpath})

    def _path(self, name: str) -> str:
        return os.path.join(str(self.dirpath), name) if name else ""

    def _save(self, trainer: Trainer, last: bool) -> None:
        """Judge the metric if it is new, and renew `last.ckpt` if asked. Every rank must call it."""
        candidates = self._monitor_candidates(trainer)
        path = self.format_checkpoint_name(candidates, self.CHECKPOINT_NAME_LAST)
        self.last_model_path, self._just_saved = path if last else self.last_model_path, ""
        if self._is_fresh:
            self._is_fresh = False
            self._save_topk_checkpoint(trainer, candidates)  # does nothing without a monitor
        if last:
            self._last_is_due = False
            if not (self._just_saved and self._link(trainer, self._just_saved, path)):
                self._save_checkpoint(trainer, path)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._just_saved = filepath

    def _link(self, trainer: Trainer, source: str, target: str) -> bool:
        """Give the best file that was written a moment ago the last one's name too; every rank gets the answer."""
        linked = False
        if trainer.is_global_zero and Path(source).is_file():
            keep_previous = getattr(trainer.strategy.checkpoint_io, "keep_previous", False)
            with contextlib.suppress(OSError):  # no hard links here: it is written a second time
                atomic.link(source, target, keep_previous)
                linked = True
        return bool(trainer.strategy.broadcast(linked))
