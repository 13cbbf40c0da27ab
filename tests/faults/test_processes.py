"""Signals, lost ranks, lost workers: the run ends soon, says why, and can go on."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.preemption import EXIT_PREEMPTED
from callbacks.rank_watch import RankWatch
from cli.__main__ import main
from faults.cases import case
from restrike.checkpoints import atomic
from resume.harness import Run, differences, end, train
from resume.processes import run, start, wait

LOST_RANK_LIMIT_S = 60
TERM, KILL = signal.SIGTERM, signal.SIGKILL


def text(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def finish(folder: Path, ranks: int = 1) -> list[int]:
    return run(train, Run(folder), True, log=folder / "log.txt", ranks=ranks)


@case("processes", "{name} to the one process", promise="saved at the step's end, status 75, goes on")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_process(name: str, tmp_path: Path) -> None:
    asked = Run(tmp_path, kill_at=("optimizer step", 0, 4), kill_with=signal.Signals[name], every_n_train_steps=None)
    assert run(train, asked, log=tmp_path / "log.txt") == [EXIT_PREEMPTED]
    assert "saving" in text(tmp_path) and "at step 5" in text(tmp_path)
    assert finish(tmp_path) == [0]


@case("processes", "SIGTERM to rank {rank} of 2 only", promise="both save and leave with status 75; no hang")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank(rank: int, tmp_path: Path) -> None:
    asked = Run(tmp_path, kill_at=("batch end", 0, 3), kill_with=TERM, kill_rank=rank, every_n_train_steps=None)
    assert run(train, asked, log=tmp_path / "log.txt", ranks=2) == [EXIT_PREEMPTED] * 2
    assert finish(tmp_path, ranks=2) == [0, 0]


@case("processes", "SIGTERM during the sanity check", promise="saved after the first step, status 75")
def test_a_signal_before_the_first_step(tmp_path: Path) -> None:
    asked = Run(tmp_path, more=((SignalInSanityCheck, {}),), every_n_train_steps=None)
    assert run(train, asked, log=tmp_path / "log.txt") == [EXIT_PREEMPTED]
    assert "at step 1" in text(tmp_path)


class SignalInSanityCheck(Callback):
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking:
            os.kill(os.getpid(), TERM)


@case("processes", "SIGTERM again and again while saving", promise="the save is finished; status 75")
def test_signals_while_saving(tmp_path: Path) -> None:
    asked = Run(tmp_path, kill_at=("batch end", 0, 3), kill_with=TERM, more=((SignalWhileSaving, {}),))
    assert run(train, asked, log=tmp_path / "log.txt") == [EXIT_PREEMPTED]
    assert atomic.newest_valid(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "last.ckpt"


class SignalWhileSaving(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        atomic.failpoint = lambda name: os.kill(os.getpid(), TERM)


@case("processes", "SIGKILL of the one process in mid-step", promise="goes on bitwise from the last save")
def test_sigkill_goes_on_bitwise(tmp_path: Path) -> None:
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    for folder in (plain, killed):
        folder.mkdir()
    assert run(train, Run(plain), log=plain / "log.txt") == [0]
    asked = Run(killed, kill_at=("optimizer step", 1, 5), every_n_train_steps=3)
    assert run(train, asked, log=killed / "log.txt") == [-KILL]
    assert finish(killed) == [0]
    assert differences(end(killed), end(plain)) == []


WATCHED = ((RankWatch, {"grace_s": 3.0}),)
NAMED = f"within {LOST_RANK_LIMIT_S} s the other ends, and names rank, host and process id"


def end_of_a_pair(asked: Run) -> tuple[list[int], list[int]]:
    """(exit statuses, process ids); asserts that they end in time."""
    before = time.monotonic()
    processes = start(train, asked, log=asked.folder / "log.txt", ranks=2)
    pids = [int(process.pid or 0) for process in processes]
    statuses = wait(processes)
    assert time.monotonic() - before < LOST_RANK_LIMIT_S
    return statuses, pids


@case("processes", "SIGKILL of rank {rank} of 2 in mid-step", promise=NAMED + "; both go on from the last save")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_rank_ends_the_job(rank: int, tmp_path: Path) -> None:
    asked = Run(tmp_path, kill_at=("optimizer step", 0, 4), kill_rank=rank, more=WATCHED)
    statuses, pids = end_of_a_pair(asked)
    assert statuses[rank] == -KILL
    assert statuses[1 - rank] not in (0, -KILL)
    assert re.search(rf"error: rank {rank} \(\S+, pid {pids[rank]}\) is gone .*; rank {1 - rank} \(", text(tmp_path))
    assert finish(tmp_path, ranks=2) == [0, 0]


@case("processes", "SIGKILL of rank 1 of 2 while rank 0 hears of nothing", promise=NAMED)
def test_a_rank_that_waits_for_ever_is_ended(tmp_path: Path) -> None:
    asked = Run(tmp_path, kill_at=("batch start", 0, 4), kill_rank=1, more=(*WATCHED, (WaitForEver, {})))
    statuses, pids = end_of_a_pair(asked)
    assert statuses == [1, -KILL]
    assert f"pid {pids[1]}) is gone" in text(tmp_path)


class WaitForEver(Callback):
    """As in a collective of NCCL, which does not fail when a rank is lost."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4 and trainer.global_rank == 0:
            time.sleep(10 * LOST_RANK_LIMIT_S)


@case(
    "processes", "an error on rank {rank} of 2 alone", promise="the other ends, and says whose error it was and which"
)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank(rank: int, tmp_path: Path) -> None:
    statuses, pids = end_of_a_pair(Run(tmp_path, more=(*WATCHED, (FailOnRank, {"rank": rank}))))
    assert 0 not in statuses
    assert re.search(rf"error: rank {rank} \(\S+, pid {pids[rank]}\) ended with KeyError: 'a defect'", text(tmp_path))


class FailOnRank(Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4 and trainer.global_rank == self.rank:
            raise KeyError("a defect")


@case(
    "processes",
    "a loader's worker is killed (out of memory)",
    promise="the run ends at once with an error, and goes on",
)
def test_a_killed_worker(tmp_path: Path) -> None:
    asked = Run(tmp_path, workers=2, more=((KillWorker, {}),))
    (status,) = run(train, asked, log=tmp_path / "log.txt")
    assert status == 1
    assert re.search(r"DataLoader worker \(pid.* \d+\)|ConnectionResetError|EOFError", text(tmp_path))
    assert finish(tmp_path) == [0]


class KillWorker(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            worker = torch.multiprocessing.active_children()[0]
            os.kill(worker.pid, KILL)


def fit_by_command_line(folder: Path) -> None:
    os.chdir(folder)
    raise SystemExit(main(["fit", "--config", str(TINY), *OPTIONS]))


TINY = Path(__file__).resolve().parents[1] / "cli" / "recipes" / "conf" / "tiny.yaml"
OPTIONS = [
    "--trainer.enable_checkpointing=true",
    "--callbacks.preemption=callbacks.preemption.Preemption",
    "--callbacks.signal=faults.test_processes.SignalAtFirstStep",
    "--allow_class_path=faults",
]


class SignalAtFirstStep(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            os.kill(os.getpid(), TERM)


@case("processes", "SIGTERM to a run of the command line", promise="saved in its run folder; the shell sees status 75")
def test_the_status_reaches_the_shell(tmp_path: Path) -> None:
    assert run(fit_by_command_line, tmp_path, log=tmp_path / "log.txt") == [EXIT_PREEMPTED], text(tmp_path)
    assert atomic.newest_valid(tmp_path / "runs" / "tiny" / "checkpoints") is not None
    assert "Traceback" not in text(tmp_path)
