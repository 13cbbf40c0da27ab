"""Real signals to real processes: the run saves, leaves with status 75, and goes on bitwise."""

import re
import signal
from pathlib import Path

import pytest

from callbacks.preemption import EXIT_PREEMPTED
from resume.harness import Run, curve, differences, end, train
from resume.processes import run


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert run(train, Run(folder, every_n_train_steps=None), log=folder / "log.txt") == [0]
    return folder


@pytest.fixture(scope="module")
def unbroken_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken_pair")
    assert run(train, Run(folder, every_n_train_steps=None), log=folder / "log.txt", ranks=2) == [0, 0]
    return folder


def values(folder: Path) -> dict[tuple[int, str], float]:
    return {key: value for key, value in curve(folder).items() if key[1] != "train/loss_epoch"}


PLACES = {
    "during a step": ("optimizer step", 0, 4),
    "at a batch's end": ("batch end", 0, 6),
    "at an epoch's last step, before its validation": ("optimizer step", 0, 9),
    "as a validation begins": ("validation", 0, 0),
    "within a validation": ("validation", 0, 1),
    "at an epoch's end": ("epoch end", 0, 0),
}


@pytest.mark.parametrize(("place", "name"), [*((p, "SIGTERM") for p in PLACES), ("at a batch's end", "SIGUSR1")])
def test_one_process_saves_leaves_and_goes_on(place: str, name: str, unbroken: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    asked = Run(tmp_path, kill_at=PLACES[place], kill_with=signal.Signals[name], every_n_train_steps=None)
    assert run(train, asked, log=log) == [EXIT_PREEMPTED], log.read_text()
    assert "asked to stop: saving" in log.read_text()
    assert run(train, Run(tmp_path, every_n_train_steps=None), True, log=log) == [0], log.read_text()
    assert differences(end(tmp_path), end(unbroken)) == []
    assert values(tmp_path) == values(unbroken)


def test_within_an_accumulation_window_the_step_is_finished_first(tmp_path: Path) -> None:
    asked = Run(tmp_path, accumulate=3, kill_at=("batch end", 0, 3), kill_with=signal.SIGTERM)
    assert run(train, asked, log=tmp_path / "log.txt") == [EXIT_PREEMPTED]
    assert "at step 2" in (tmp_path / "log.txt").read_text()


def test_without_validation_an_epochs_end_is_reached_first(tmp_path: Path) -> None:
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    settings = {"limit_val_batches": 0, "every_n_train_steps": None}
    for folder in (plain, asked):
        folder.mkdir()
    assert run(train, Run(plain, **settings), log=plain / "log.txt") == [0]
    killed = Run(asked, kill_at=("optimizer step", 0, 9), kill_with=signal.SIGTERM, **settings)
    assert run(train, killed, log=asked / "log.txt") == [EXIT_PREEMPTED]
    assert run(train, Run(asked, **settings), True, log=asked / "log.txt") == [0]
    assert differences(end(asked), end(plain)) == []


def test_a_run_that_completes_meanwhile_ends_as_complete(tmp_path: Path) -> None:
    asked = Run(tmp_path, kill_at=("epoch end", 1, 0), kill_with=signal.SIGTERM)
    assert run(train, asked, log=tmp_path / "log.txt") == [0]


@pytest.mark.parametrize(
    ("rank", "place"),
    [(0, ("batch end", 0, 4)), (1, ("optimizer step", 0, 4)), (1, ("validation", 0, 0)), (0, ("batch end", 0, 9))],
)
def test_a_signal_to_one_rank_stops_all(
    rank: int, place: tuple[str, int, int], unbroken_pair: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    asked = Run(tmp_path, kill_at=place, kill_with=signal.SIGTERM, kill_rank=rank, every_n_train_steps=None)
    assert run(train, asked, log=log, ranks=2) == [EXIT_PREEMPTED, EXIT_PREEMPTED], log.read_text()
    saved_at = [int(step) for step in re.findall(r"at step (\d+)", log.read_text())]
    signalled_at = place[2] + 1 if place[0] != "validation" else 10
    assert len(saved_at) == 1
    assert saved_at[0] <= signalled_at + 4, "two askings, two steps apart"
    assert run(train, Run(tmp_path, every_n_train_steps=None), True, log=log, ranks=2) == [0, 0], log.read_text()
    for each in (0, 1):
        assert differences(end(tmp_path, each), end(unbroken_pair, each)) == []
    assert values(tmp_path) == values(unbroken_pair)


def test_ranks_draw_different_numbers(unbroken_pair: Path) -> None:
    assert differences(end(unbroken_pair, 0)["rng"], end(unbroken_pair, 1)["rng"])
