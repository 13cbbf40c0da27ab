"""Loaders that know their place: counted as batches are handed over, resumable at any step, of known length.

A rank's main process computes the plan and sends each worker whole requests; torch's DataLoader only carries them.
Results are the same for any number of workers and any way of starting them.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from restrike.data.ahead import ShardsAhead
from restrike.data.batches import (
    BadSampleCount,
    EvalBatches,
    EvalImage,
    LoadedBatch,
    Mix,
    Request,
    TrainBatches,
    TrainImage,
)
from restrike.data.cache import ShardCache
from restrike.data.plan import DEFAULT_LANES, START, EpochPlan, Position, evaluation_ids
from restrike.data.samples import ImageBatch
from restrike.data.source import ImageSource

_PR_SET_PDEATHSIG = 1  # prctl(2)

_AHEAD_STEPS = 64  # how far before its first use a remote shard is asked for


@dataclass(frozen=True)
class WorkerOptions:
    """How batches are made.

    Attributes:
        num_workers: processes of each loader; 0 = in the main process.
        prefetch_factor: batches that each worker makes ahead.
        persistent_workers: keep them between epochs.
        pin_memory: copy batches to pinned memory (only where CUDA is there).
        start_method: "fork", "spawn", "forkserver"; None = the platform's.
        timeout_s: a worker that is silent for so long ends the run; 0 = wait for ever.
    """

    num_workers: int = 4
    prefetch_factor: int = 2
    persistent_workers: bool = True
    pin_memory: bool = True
    start_method: str | None = None
    timeout_s: float = 600.0


class _Loader:
    """Carries requests to workers and loaded batches back."""

    def __init__(
        self,
        batches: TrainBatches | EvalBatches,
        requests: Sampler[Request] | list[Request],
        options: WorkerOptions,
    ) -> None:
        self.bad_samples = BadSampleCount(batches.max_bad_samples)
        self._loader = _data_loader(batches, requests, options)
        self._running: Any = None

    def close(self) -> None:
        """Stop the workers now. Left to the garbage collector, each may take seconds to be noticed."""
        running, self._running = self._running, None
        self._loader._iterator = None
        if hasattr(running, "_shutdown_workers"):
            running._shutdown_workers()

    def _batches(self) -> Iterator[ImageBatch]:
        """Of one pass, once their bad samples are counted. A failure stops the workers before it is told."""
        self._running = iter(self._loader)
        try:
            for loaded in self._running:
                yield self.bad_samples.checked(loaded)
        except Exception:
            self.close()
            raise


class TrainLoader(_Loader):
    """Batches of one rank, from `position` on; each `iter` goes on where the last one stopped handing over.

    An iteration is as many batches as an epoch has, also where it begins in the middle of one; a trainer that resumes
    stops by its own count. So what a run sees at its n-th step does not depend on how its epochs are cut
    (`limit_train_batches`).

    Args:
        plan: the order.
        batches: makes them.
        options: workers.
        rank, world_size: of this process; never guessed from the environment.
        position: where to begin.
        cache: for fetching remote shards ahead of their use.
        repeat: begin each `iter` at `position` again (to overfit a few batches).
    """

    def __init__(
        self,
        plan: EpochPlan,
        batches: TrainBatches,
        options: WorkerOptions,
        rank: int = 0,
        world_size: int = 1,
        position: Position = START,
        cache: ShardCache | None = None,
        repeat: bool = False,
    ) -> None:
        self.plan, self.position = plan, position
        self._restart_at = position if repeat else None
        ahead = ShardsAhead(batches.source, cache) if cache else None
        self._requests = _TrainRequests(plan, rank, world_size, ahead)
        super().__init__(batches, self._requests, options)

    def __len__(self) -> int:
        """Steps of a whole epoch, also where this one is resumed in its middle."""
        return self.plan.steps

    def __iter__(self) -> Iterator[ImageBatch]:
        if self._restart_at:
            self.position = self._restart_at
        self._requests.position = self.position
        for batch in self._batches():
            self.position = self.plan.after(self.position)
            yield batch


class EvalLoader(_Loader):
    """Each sample of a split once over all ranks; equal numbers of equal batches on each (see `evaluation_ids`)."""

    def __init__(
        self,
        batches: EvalBatches,
        batch_size: int,
        options: WorkerOptions,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        ids = evaluation_ids(len(batches.source), batch_size, rank, world_size)
        self._length = len(ids)
        super().__init__(batches, [Request(0, step, row) for step, row in enumerate(ids)], options)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[ImageBatch]:
        self.bad_samples.reset()
        yield from self._batches()


def create_train_loader(
    source: ImageSource,
    transform: TrainImage,
    mixing: Mix | None,
    batch_size: int,
    seed: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    position: Position = START,
    options: WorkerOptions = WorkerOptions(),
    max_bad_samples: int = 0,
    lanes: int = DEFAULT_LANES,
    cache: ShardCache | None = None,
) -> TrainLoader:
    """A training loader of one rank; `batch_size` is per rank. Needs no trainer."""
    plan = EpochPlan(source.shard_sizes, batch_size * world_size, seed, source.window, lanes)
    batches = TrainBatches(source, transform, mixing, seed, rank, max_bad_samples)
    return TrainLoader(plan, batches, options, rank, world_size, position, cache)


def create_eval_loader(
    source: ImageSource,
    transform: EvalImage,
    image_size: int,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    options: WorkerOptions = WorkerOptions(),
    labelled: bool = True,
    max_bad_samples: int = 0,
) -> EvalLoader:
    """An evaluation loader of one rank; `batch_size` is per rank."""
    batches = EvalBatches(source, transform, image_size, labelled, max_bad_samples)
    return EvalLoader(batches, batch_size, options, rank, world_size)


class _TrainRequests(Sampler[Request]):
    """Requests of one iteration, from `position` on."""

    def __init__(self, plan: EpochPlan, rank: int, world_size: int, ahead: ShardsAhead | None) -> None:
        self._plan, self._rank, self._world_size, self._ahead = plan, rank, world_size, ahead
        self.position = START

    def __iter__(self) -> Iterator[Request]:
        position = self.position
        if self._ahead:
            self._ahead.forget()  # what was fetched for the last iteration may have been evicted since
        for number in range(self._plan.steps):
            if self._ahead:
                self._look_ahead(position, first=number == 0)
            yield Request(*position, self._ids(position))
            position = self._plan.after(position)

    def _look_ahead(self, position: Position, first: bool) -> None:
        """Within the epoch: at its first step for all steps in reach, then for the step that came into reach."""
        epoch, step = position
        assert self._ahead is not None
        begin = step if first or step == 0 else step + _AHEAD_STEPS
        for wanted in range(begin, min(step + _AHEAD_STEPS + 1, self._plan.steps)):
            self._ahead.ask(self._ids(Position(epoch, wanted)))

    def _ids(self, position: Position) -> np.ndarray:
        return self._plan.batch(position.epoch, position.step, self._rank, self._world_size)


def _data_loader(
    batches: TrainBatches | EvalBatches,
    requests: Sampler[Request] | list[Request],
    options: WorkerOptions,
) -> DataLoader[LoadedBatch]:
    _one_cv2_thread()
    workers = options.num_workers
    return DataLoader(
        batches,
        sampler=requests,  # type: ignore[arg-type]  # any iterable of what __getitem__ takes
        batch_size=None,
        collate_fn=_unchanged,  # type: ignore[arg-type]  # no list of samples where batch_size is None
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=options.pin_memory and torch.cuda.is_available(),
        prefetch_factor=options.prefetch_factor if workers else None,
        persistent_workers=options.persistent_workers and workers > 0,
        multiprocessing_context=options.start_method if workers else None,
        timeout=options.timeout_s if workers else 0,
        generator=torch.Generator(),  # else each iteration draws from the global stream, and resuming shifts it
    )


def _unchanged(loaded: LoadedBatch) -> LoadedBatch:
    return loaded


def _start_worker(worker: int) -> None:
    _one_cv2_thread()  # spawned workers come with OpenCV's own default
    _die_with_parent()


def _die_with_parent() -> None:
    """A run that is killed would leave its workers, or those that are just starting, waiting for ever."""
    with suppress(OSError, AttributeError):  # on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if parent.pid != os.getppid():  # a fork server, which lives as long as its workers do
        threading.Thread(target=_exit_after, args=(parent,), name="die-with-parent", daemon=True).start()
    if not parent.is_alive():  # it died before the kernel was asked
        os._exit(1)


def _exit_after(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


def _one_cv2_thread() -> None:
    """Workers are the parallelism. Set in the parent too, before it forks: a forked copy of a running thread pool
    hangs as soon as it is touched, even to switch it off."""
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)
