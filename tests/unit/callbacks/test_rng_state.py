"""Generators are captured, put back, and kept apart from validation and between ranks."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from callbacks.rng_state import RngState
from callbacks.step_seed import StepSeed
from resume.harness import ToyData, ToyModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def draw() -> list[float]:
    return [torch.rand(1).item(), float(np.random.rand()), random.random(), float(np.random.randn())]


def trainer(*callbacks: Callback, **arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **arguments,
    )


def test_the_state_survives_a_safe_file(tmp_path: Path) -> None:
    np.random.randn()  # leaves a cached second number, which is state too
    torch.save(RngState().state_dict(), tmp_path / "state.pt")
    expected = draw()
    draw()
    callback = RngState()
    callback.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    callback.on_train_start(trainer(), ToyModule())
    assert draw() == expected


class Draw(Callback):
    """Notes what training would draw."""

    def __init__(self, in_validation: bool = False) -> None:
        self.in_validation, self.drawn = in_validation, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.drawn.append(draw())

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.in_validation:
            draw()


def drawn(in_validation: bool, tmp_path: Path) -> list[list[float]]:
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    callback = Draw(in_validation)
    runs = trainer(RngState(), callback, max_epochs=2, limit_train_batches=3, default_root_dir=tmp_path)
    runs.fit(ToyModule(), datamodule=ToyData())
    return callback.drawn


def test_what_validation_draws_does_not_change_training(tmp_path: Path) -> None:
    assert drawn(True, tmp_path) == drawn(False, tmp_path)


@pytest.mark.parametrize("first", ["rng_state", "step_seed"])
def test_a_callback_that_seeds_each_step_has_the_last_word_in_either_order(first: str, tmp_path: Path) -> None:
    state = RngState().state_dict()
    pairs = {"rng_state": RngState(), "step_seed": StepSeed(seed=1)}
    pairs["rng_state"].load_state_dict(state)
    callbacks = [pairs.pop(first), *pairs.values()]
    watch = Draw()
    trainer(*callbacks, watch, max_steps=1, default_root_dir=tmp_path).fit(ToyModule(), datamodule=ToyData())
    torch.manual_seed(123)
    expected = Draw()
    trainer(StepSeed(seed=1), expected, max_steps=1, default_root_dir=tmp_path).fit(ToyModule(), datamodule=ToyData())
    assert watch.drawn[0][0] == expected.drawn[0][0]


def test_a_checkpoint_of_other_ranks_is_said_and_gone_on_with() -> None:
    callback = RngState()
    callback.load_state_dict({"ranks": RngState().state_dict()["ranks"] * 4})
    with pytest.warns(UserWarning, match="saved by 4 ranks, this run has 1"):
        callback.on_train_start(trainer(), ToyModule())
