"""Masks that differ between ranks and not between runs; a run that has failed ends; when statistics are synced."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import EMA, BatchNormSync, StepSeed, TrainingDivergedError, ValidationGuard
from callbacks.batch_norm_sync import running_statistics
from training_tools import ToyData, toy_module, toy_trainer


class Place:
    def __init__(self, epoch: int = 0, rank: int = 0) -> None:
        self.current_epoch, self.global_rank = epoch, rank


def mask(batch_idx: int = 0, seed: int = 0, **place: int) -> torch.Tensor:
    module = SimpleNamespace(device=torch.device("cpu"))
    StepSeed(seed).on_train_batch_start(Place(**place), module, None, batch_idx)
    return torch.rand(8)


def test_masks_depend_on_seed_epoch_batch_and_rank_alone():
    assert torch.equal(mask(), mask())
    for other in (mask(batch_idx=1), mask(seed=1), mask(epoch=1), mask(rank=1)):
        assert not torch.equal(mask(), other)


@pytest.mark.parametrize("name", ["loss", "loss_ema"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, name, value):
    class Finished:
        sanity_checking, current_epoch, global_step = False, 5, 99
        callback_metrics = {"val/loss": 1.0, f"val/{name}": value}
        state = type("State", (), {"fn": "fit"})

    with pytest.raises(TrainingDivergedError, match=f"val/{name} is {value} after epoch 5, step 99"):
        ValidationGuard().on_validation_end(Finished(), None)


@pytest.mark.parametrize("floor, epoch, ends", [(0.01, 1, True), (0.01, 0, False), (0.0, 1, False), (0.004, 1, False)])
def test_the_floor_of_top1_is_an_option_from_the_second_epoch_on(floor, epoch, ends):
    class Finished:
        sanity_checking, global_step = False, 99
        callback_metrics = {"val/loss": 1.0, "val/top1": 0.005}
        state = type("State", (), {"fn": "fit"})

    trainer = Finished()
    trainer.current_epoch = epoch
    if ends:
        with pytest.raises(TrainingDivergedError, match="val/top1 is 0.0050 .* below"):
            ValidationGuard(min_top1=floor).on_validation_end(trainer, None)
    else:
        ValidationGuard(min_top1=floor).on_validation_end(trainer, None)


def test_batch_norm_is_synced_once_an_epoch_between_its_last_step_and_its_validation(tmp_path, monkeypatch):
    happened = []
    monkeypatch.setattr("callbacks.batch_norm_sync.average_", lambda tensors: happened.append(f"sync {len(tensors)}"))

    class Spy(Callback):
        def on_train_batch_end(self, *_) -> None:
            happened.append("step")

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
            if batch_idx == 0:
                happened.append("validation")

    net = toy_module().net
    two = [f"sync {len(running_statistics(net))}"] * 2  # of the network and of its average
    steps = ["step", "step"]
    settings = {"max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": 1}
    trainer = toy_trainer(tmp_path, callbacks=[BatchNormSync(), Spy(), EMA()], **settings)
    trainer.fit(toy_module(), datamodule=ToyData())
    assert happened == ["validation", *2 * [*steps, "validation", *steps, *two, "validation"]]
    happened.clear()
    trainer = toy_trainer(tmp_path, callbacks=[BatchNormSync(), Spy()], limit_val_batches=0, max_epochs=2)
    trainer.fit(toy_module(), datamodule=ToyData())
    assert happened == 2 * [*steps, *steps, two[0]]
