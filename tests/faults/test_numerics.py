"""NaN and infinity: all ranks decide alike, and nothing of them reaches the weights."""

import signal
from pathlib import Path

import numpy as np
import torch

from callbacks.finite_guard import FiniteGuard
from faults.cases import case
from restrike.data.plan import EpochPlan
from resume.harness import GLOBAL_BATCH, NUM_SAMPLES, Run, curve, differences, end, train
from resume.processes import run


def guarded(**arguments: object) -> dict[str, object]:
    return {"poison": (5,), "epochs": 1, "more": ((FiniteGuard, arguments),)}


def step_with(sample: int) -> int:
    """The step of the first epoch at which the toy's loader gives a sample."""
    plan = EpochPlan(np.ones(NUM_SAMPLES, dtype=np.int64), GLOBAL_BATCH, seed=7)
    return next(step for step in range(plan.steps) if sample in plan.batch(0, step))


@case("numerics", "one NaN image, one process", promise="its step is skipped, weights stay finite, the run goes on")
def test_nan_is_skipped(tmp_path: Path) -> None:
    assert run(train, Run(tmp_path, **guarded()), log=tmp_path / "log.txt") == [0]
    assert all(torch.isfinite(tensor).all() for tensor in end(tmp_path)["module"].values())
    assert f"at step {step_with(5)} " in (tmp_path / "log.txt").read_text()


@case("numerics", "a NaN image on one rank of 2", promise="both skip the same step and stay equal")
def test_nan_on_one_rank(tmp_path: Path) -> None:
    assert run(train, Run(tmp_path, **guarded()), log=tmp_path / "log.txt", ranks=2) == [0, 0]
    a, b = end(tmp_path, 0), end(tmp_path, 1)
    assert differences(a["optimizer"], b["optimizer"]) == []
    unequal = differences(a["module"], b["module"])
    assert all("running_" in name for name in unequal), "BatchNorm statistics are each rank's own"
    assert all(torch.isfinite(tensor).all() for tensor in a["module"].values())


@case("numerics", "a NaN image, and the run may not skip", promise="it ends and names the batch's samples")
def test_nan_stops_with_the_keys(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert run(train, Run(tmp_path, **guarded(on_nonfinite="stop")), log=log) == [1]
    message = next(line for line in log.read_text().splitlines() if "NonFiniteGradientError:" in line)
    assert f"at step {step_with(5)} " in message
    assert " 5" in message.partition("samples")[2]


@case("numerics", "NaN in every batch", promise="it ends after the bounded number of skips")
def test_endless_nan_is_bounded(tmp_path: Path) -> None:
    poisoned = Run(tmp_path, poison=tuple(range(42)), more=((FiniteGuard, {"max_consecutive": 3}),))
    assert run(train, poisoned, log=tmp_path / "log.txt") == [1]
    assert "4 in a row of 3 allowed" in (tmp_path / "log.txt").read_text()


@case("numerics", "SIGKILL after a skipped step", promise="the resumed run is bitwise the unbroken one")
def test_resume_after_a_skip(tmp_path: Path) -> None:
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    for folder in (plain, killed):
        folder.mkdir()
    assert run(train, Run(plain, **guarded()), log=plain / "log.txt") == [0]
    place = ("batch start", 0, step_with(5) + 1)
    assert run(train, Run(killed, kill_at=place, **guarded()), log=killed / "log.txt") == [-signal.SIGKILL]
    assert run(train, Run(killed, **guarded()), True, log=killed / "log.txt") == [0]
    assert differences(end(killed), end(plain)) == []
    assert curve(killed).keys() == curve(plain).keys()
