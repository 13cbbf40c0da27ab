"""The quickstart's recipe, killed with SIGKILL and started again, ends bitwise as the run that nobody killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from resume.harness import differences
from resume.processes import run
from resume.quickstart import PLACES, curves, fit, prepare

KILLED = -signal.SIGKILL
LAST, AUTO = "--ckpt_path=last", "--auto=true"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    assert run(prepare, folder / "set", log=folder / "log.txt") == [0], (folder / "log.txt").read_text()
    return folder / "set"


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    start(folder, data, None, 0)
    return folder


def start(folder: Path, data: Path, place: str | None, workers: int, *options: str) -> None:
    """Start the run, which is killed at the place, or else has to end well."""
    log = folder.parent / "log.txt"
    status = run(fit, folder, data, place, f"--data.num_workers={workers}", *options, log=log)
    assert status == [KILLED if place else 0], f"{place}: {log.read_text()}"


def assert_equal_runs(folder: Path, reference: Path) -> None:
    ended, expected = (torch.load(each / "end.pt", weights_only=True) for each in (folder, reference))
    assert differences(ended, expected) == []
    logged, expected_log = curves(folder), curves(reference)
    assert len(expected_log["train/loss"][0]) == 33
    assert len(expected_log["train/loss_mesa"][0]) == 22
    assert {"val/top1", "val/top1_ema", "train/grad_norm", "lr/decay"} <= expected_log.keys()
    assert logged.keys() == expected_log.keys()
    assert [name for name in logged if logged[name] != expected_log[name]] == []


FAST = {
    0: [
        "inside an accumulation window", "just after a validation", "as MESA starts",
        "as the patch embedding is unfrozen",
    ],
    2: ["inside a window after MESA's start"],
}  # fmt: skip


@pytest.mark.parametrize(("workers", "again"), [(0, LAST), (2, AUTO)])
def test_a_run_that_is_killed_again_and_again(
    workers: int, again: str, data: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options: list[str] = [] if again == LAST else [again]
    for place in FAST[workers]:
        start(folder, data, place, workers, *options)
        options = [again]
    start(folder, data, None, workers, again)
    assert_equal_runs(folder, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_killed_once(place: str, workers: int, data: Path, unbroken: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", data, place, workers)
    start(tmp_path / "run", data, None, workers, LAST)
    assert_equal_runs(tmp_path / "run", unbroken)
