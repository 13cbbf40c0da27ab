"""A run that is killed with SIGKILL and started again ends bitwise as the run that nobody killed."""

import functools
import signal
from pathlib import Path
from typing import Any

import pytest

from callbacks.preemption import EXIT_PREEMPTED
from resume.harness import Run, curve, differences, end, train
from resume.processes import run

EPOCH_MEAN = "train/loss_epoch"  # Lightning averages only what a process has seen of an epoch


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the unbroken run of given settings, trained once."""

    @functools.cache
    def trained(**settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("unbroken")
        assert run(train, Run(folder, **settings), log=folder / "log.txt") == [0]
        return folder

    return trained


def resume_until_done(folder: Path, settings: dict[str, Any], kill_at: Any, **options: Any) -> None:
    """Start, be killed, start again."""
    killed = Run(folder, kill_at=kill_at, **settings, **options)
    assert run(train, killed, log=folder / "log.txt") == [-signal.SIGKILL]
    resumed = Run(folder, **settings, **options)
    assert run(train, resumed, True, log=folder / "log.txt") == [0], (folder / "log.txt").read_text()


def assert_equal_runs(folder: Path, reference: Path) -> None:
    assert differences(end(folder), end(reference)) == []
    values, expected = curve(folder), curve(reference)
    values = {key: value for key, value in values.items() if key[1] != EPOCH_MEAN}
    assert values == {key: value for key, value in expected.items() if key[1] != EPOCH_MEAN}


PLACES = {
    "before the first step": ("batch start", 0, 0),
    "in the middle of an epoch": ("batch start", 0, 4),
    "between gradients and their step": ("optimizer step", 0, 5),
    "after the step before its save": ("batch end", 0, 5),
    "at an epoch's last batch": ("batch end", 0, 9),
    "as a validation begins": ("validation", 0, 0),
    "within a validation": ("validation", 0, 1),
    "as a validation ends": ("validation end", 0, 0),
    "at an epoch's end": ("epoch end", 0, 0),
    "at the next epoch's first batch": ("batch start", 1, 0),
    "in the last epoch": ("batch end", 1, 6),
    "at the end of the run": ("epoch end", 1, 0),
}


WITH_WORKERS = ("in the middle of an epoch", "at an epoch's last batch", "within a validation", "in the last epoch")


@pytest.mark.parametrize(("place", "workers"), [*((p, 0) for p in PLACES), *((p, 2) for p in WITH_WORKERS)])
def test_killed_run_goes_on_bitwise(place: str, workers: int, unbroken: Any, tmp_path: Path) -> None:
    resume_until_done(tmp_path, {}, PLACES[place], workers=workers)
    assert_equal_runs(tmp_path, unbroken())


@pytest.mark.parametrize(("batch", "workers"), [(3, 0), (4, 0), (4, 2), (5, 0), (9, 2)])
def test_killed_within_an_accumulation_window(batch: int, workers: int, unbroken: Any, tmp_path: Path) -> None:
    """Windows are batches 0-2, 3-5, 6-8, and 9 alone."""
    settings = {"accumulate": 3}
    resume_until_done(tmp_path, settings, ("batch start", 0, batch), workers=workers)
    assert_equal_runs(tmp_path, unbroken(**settings))


@pytest.mark.parametrize("place", [("batch end", 0, 4), ("validation", 0, 1), ("validation end", 0, 0)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_killed_around_a_validation_within_the_epoch(
    place: tuple[str, int, int], accumulate: int, unbroken: Any, tmp_path: Path
) -> None:
    settings = {"val_check_interval": 0.5, "accumulate": accumulate}
    resume_until_done(tmp_path, settings, place)
    assert_equal_runs(tmp_path, unbroken(**settings))


@pytest.mark.parametrize("every_n_train_steps", [None, 3, 4])
def test_steps_since_the_last_save_are_repeated_alike(
    every_n_train_steps: int | None, unbroken: Any, tmp_path: Path
) -> None:
    resume_until_done(tmp_path, {}, ("batch end", 1, 7), every_n_train_steps=every_n_train_steps)
    assert_equal_runs(tmp_path, unbroken())


def test_killed_twice(unbroken: Any, tmp_path: Path) -> None:
    assert run(train, Run(tmp_path, kill_at=("batch end", 0, 3)), log=tmp_path / "log.txt") == [-9]
    assert run(train, Run(tmp_path, kill_at=("validation", 0, 1)), True, log=tmp_path / "log.txt") == [-9]
    assert run(train, Run(tmp_path), True, log=tmp_path / "log.txt") == [0]
    assert_equal_runs(tmp_path, unbroken())


@pytest.mark.parametrize("step", ["opened", "writing", "written", "synced", "kept previous", "renamed", "done"])
def test_killed_while_saving(step: str, unbroken: Any, tmp_path: Path) -> None:
    resume_until_done(tmp_path, {}, ("save", step, 4))
    assert differences(end(tmp_path), end(unbroken())) == []
    missing = {key[0] for key in curve(unbroken()).keys() - curve(tmp_path).keys()}
    assert missing <= {4}, "at most the row of the step that was being saved"
    assert not list((tmp_path / "checkpoints").glob("*.tmp-*")), "what the killed save left is cleaned up"


CLASSIFIER = {"is_classifier": True, "epochs": 3, "accumulate": 2}  # 4 batches an epoch
CLASSIFIER_PLACES = {
    "as MESA starts": ("batch start", 1, 0),
    "within a window after MESA's start": ("batch start", 1, 1),
    "as the stem is unfrozen": ("batch start", 2, 0),
    "after the stem was unfrozen": ("batch end", 2, 2),
    "within the validation before that": ("validation", 1, 1),
    "at the epoch's end before that": ("epoch end", 1, 0),
}


@pytest.mark.parametrize(
    ("place", "number"),
    [
        *((place, signal.SIGKILL) for place in CLASSIFIER_PLACES),
        ("after the stem was unfrozen", signal.SIGTERM),
        ("within the validation before that", signal.SIGTERM),
    ],
)
def test_classifier_with_all_its_callbacks(place: str, number: int, unbroken: Any, tmp_path: Path) -> None:
    killed = Run(tmp_path, kill_at=CLASSIFIER_PLACES[place], kill_with=number, **CLASSIFIER)
    status = EXIT_PREEMPTED if number == signal.SIGTERM else -number
    assert run(train, killed, log=tmp_path / "log.txt") == [status], (tmp_path / "log.txt").read_text()
    assert run(train, Run(tmp_path, **CLASSIFIER), True, log=tmp_path / "log.txt") == [0]
    assert_equal_runs(tmp_path, unbroken(**CLASSIFIER))
