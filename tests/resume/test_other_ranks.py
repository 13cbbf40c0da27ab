"""A run that goes on with another number of ranks sees the same global batches, and learns the same."""

from pathlib import Path

import pytest

from resume.harness import Run, curve, end, train
from resume.processes import run

KILLED = -9
TOLERANCE = 1e-5  # relative; a gradient is summed in another order. Measured: 2e-7


def test_one_two_one_ranks_with_the_same_global_batch(tmp_path: Path) -> None:
    plain, moved = tmp_path / "plain", tmp_path / "moved"
    for folder in (plain, moved):
        folder.mkdir()
    log = moved / "log.txt"
    assert run(train, Run(plain, is_plain=True), log=plain / "log.txt") == [0]
    stops = {"is_plain": True, "kill_rank": -1}
    assert run(train, Run(moved, kill_at=("batch start", 0, 4), **stops), log=log) == [KILLED]
    ended = run(train, Run(moved, kill_at=("batch start", 1, 3), **stops), True, log=log, ranks=2)
    assert KILLED in ended, log.read_text()
    assert run(train, Run(moved, is_plain=True), True, log=log) == [0], log.read_text()

    expected, values = curve(plain), curve(moved)
    samples = {key: value for key, value in expected.items() if key[1] == "train/first_sample"}
    assert {key: values[key] for key in samples} == samples
    losses = {key: value for key, value in expected.items() if key[1] in ("train/loss", "val/loss")}
    assert {key: values[key] for key in losses} == pytest.approx(losses, rel=TOLERANCE)
    for name, weight in end(plain)["module"].items():
        assert (end(moved)["module"][name] - weight).norm() <= TOLERANCE * weight.norm(), name
