"""Leave in good order when the scheduler takes the machine away.

Lightning's own handlers either save nothing and exit with 0, or call collectives inside the signal handler, where one
signalled rank hangs the job. Here a handler sets a flag, ranks agree between optimiser steps, all save, all leave.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed as dist

from callbacks.step_boundary import ends_epoch, may_save, validation_follows

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: not done, try again


class PreemptedError(SystemExit):
    """The run was asked to stop and has saved; its code is the process's exit status."""


class Preemption(Checkpoint):
    """On SIGTERM or SIGUSR1 saves at the next step boundary and ends the process with status 75.

    The boundary is the end of an optimiser step, or a validation batch: a validation that was cut short is repeated
    whole by the resumed run. A run that completes meanwhile ends as complete.

    Any rank may get the signal. Each asks the others every `every_n_steps` steps (or validation batches, of which all
    ranks must have equally many) and reads the answer at the next asking, so nobody waits, and they leave within twice
    as many steps. Between, a step costs one comparison.

    It counts as a checkpoint callback for Lightning, which therefore runs it after those whose state it saves.

    Args:
        every_n_steps: Steps between askings; one process looks at every step.
        path: The file to save, relative to the trainer's root folder: `Checkpoint`'s last one.
        signals: Names of the signals to heed.
        requeue: On SLURM, ask it to run this job again (`scontrol requeue`), on rank 0.
    """

    def __init__(
        self,
        every_n_steps: int = 5,
        path: str = "checkpoints/last.ckpt",
        signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1"),
        requeue: bool = False,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.preemption.every_n_steps must be at least 1, got {every_n_steps}")
        unknown = [name for name in signals if not hasattr(signal, name)]
        if unknown:
            raise ValueError(f"callbacks.preemption.signals: this system has no {unknown[0]} (SIGTERM, SIGUSR1, …)")
        self.every_n_steps = every_n_steps
        self.path = path
        self.signals = tuple(getattr(signal, name) for name in signals)
        self.requeue = requeue
        self.is_asked = False  # this process got a signal
        self._is_agreed = False  # some process did, and all know
        self._is_saved = False
        self._step = 0
        self._group: Any = None
        self._asking: tuple[Any, torch.Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from requeuing by itself, and from a broadcast and a device sync at every batch."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning has registered its handlers just before."""
        self._take_signals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where there is no sanity check; and the ranks' own channel."""
        self._take_signals()
        self._step = trainer.global_step
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # on the CPU: the devices are not asked

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At an optimiser step's end."""
        if trainer.global_step == self._step:
            return  # within an accumulation window
        self._step = trainer.global_step
        if not self._is_agreed and not self._agree(self._step):
            return
        if not validation_follows(trainer) and not ends_epoch(trainer):  # else the next hooks are the place
            self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave before anything of the next step happens, and after all of the last one, such as its logging."""
        if self._is_saved:
            self._leave(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Within a validation: the checkpoint says that it has begun and nothing of it is done."""
        if not may_save(trainer) or not (self._is_agreed or self._agree(batch_idx)):
            return
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        progress.reset()
        progress.increment_ready()
        progress.increment_started()
        self._save(trainer)
        self._leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At an epoch's end, when every other callback has done its part."""
        if self._is_agreed and may_save(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run is complete, so the last answer changes nothing; but it has to be taken."""
        self._stop_asking()

    def _take_signals(self) -> None:
        """Until Lightning puts back all handlers that it found, which it does when fit ends in whatever way."""
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("callbacks.preemption: signals reach only the main thread, which this is not; it is off")
            return
        for number in self.signals:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True

    def _agree(self, count: int) -> bool:
        """Whether any rank was asked to stop, as all ranks know it at this moment. All call it at the same counts."""
        if self._group is None:
            self._is_agreed = self.is_asked
        elif count % self.every_n_steps == 0:
            if self._asking is not None:
                work, answer = self._asking
                work.wait()
                self._is_agreed = bool(answer.item())
            question = torch.tensor([int(self.is_asked)])
            work = dist.all_reduce(question, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._asking = (work, question)
        return self._is_agreed

    def _stop_asking(self) -> None:
        if self._asking is not None:
            self._asking[0].wait()
            self._asking = None

    def _save(self, trainer: Trainer) -> None:
        path = os.path.join(trainer.default_root_dir, self.path)
        rank_zero_info(f"asked to stop: saving {path} at step {trainer.global_step}")
        trainer.save_checkpoint(path)
        self._is_saved = True

    def _leave(self, trainer: Trainer) -> NoReturn:
        self._stop_asking()
        if self.requeue and trainer.is_global_zero:
            _requeue()
        raise PreemptedError(EXIT_PREEMPTED if _exit_status_counts(trainer) else 0)


def _exit_status_counts(trainer: Trainer) -> bool:
    """False in the processes that Lightning starts itself: it kills the main one when a child's status is not 0."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return trainer.local_rank == 0 or not isinstance(environment, LightningEnvironment)


def _requeue() -> None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"[0-9_]+", job):
        rank_zero_warn("callbacks.preemption.requeue: this is no SLURM job, so there is nothing to requeue")
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    rank_zero_info(f"SLURM job {job}: " + (f"requeue failed: {problem}" if problem else "requeued"))
