"""VGGT's smoke recipe, killed in the middle of an epoch, ends bitwise as the run that nobody killed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import path
from resume.harness import differences
from resume.processes import run

KILLED_AT = 3  # optimiser steps; an epoch has 4


def train(folder: Path, data: Path, recipe: str, kill: bool = False) -> None:
    """The command line, in a process of its own."""
    from cli.__main__ import main

    if kill:
        _kill_after(KILLED_AT)
    options = ["+smoke=vggt", "--data.data", str(data), "--run_dir", str(folder), "--auto", "true"]
    options += ["--data.steps_per_epoch", "4", "--trainer.limit_train_batches", "4", "--trainer.max_epochs", "2"]
    options += ["--callbacks.checkpoint.every_n_train_steps", "1", "--data.num_workers", "1"]
    sys.exit(main(["fit", "--config", path(recipe), *options]))


def _kill_after(steps: int) -> None:
    import os

    from callbacks import Checkpoint

    save = Checkpoint.on_train_batch_end

    def save_and_die(self: Checkpoint, trainer: Any, *arguments: Any) -> None:
        save(self, trainer, *arguments)
        if trainer.global_step == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoint.on_train_batch_end = save_and_die  # type: ignore[method-assign]


def end(folder: Path) -> dict[str, Any]:
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    wanted = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    return {key: content[key] for key in wanted}


@pytest.mark.parametrize("recipe", ["smoke_vggt", pytest.param("vggt_co3d_finetune", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipe, tmp_path, toy_set):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(train, whole, toy_set, recipe, log=tmp_path / "log.txt") == [0], (tmp_path / "log.txt").read_text()
    assert run(train, broken, toy_set, recipe, True, log=tmp_path / "log.txt") == [-signal.SIGKILL]
    stopped = end(broken)
    assert stopped["global_step"] == KILLED_AT and differences(stopped["state_dict"], end(whole)["state_dict"])
    assert run(train, broken, toy_set, recipe, log=tmp_path / "log.txt") == [0], (tmp_path / "log.txt").read_text()
    assert end(whole)["global_step"] == 8
    assert differences(end(broken), end(whole)) == []
