"""The learning rate follows the effective batch."""

from __future__ import annotations

import pytest

from callbacks import LRScaling
from training_tools import ToyData, toy_module, toy_trainer


@pytest.mark.parametrize(
    "rule, reference, factor", [("sqrt", 16, 0.5**0.5), ("linear", 16, 0.5), ("none", 16, 1.0), ("linear", 4, 2.0)]
)
def test_factor_reaches_every_group(tmp_path, rule, reference, factor):
    module = toy_module(lr=1e-3)
    trainer = toy_trainer(tmp_path, callbacks=[LRScaling(reference, rule)], max_steps=1, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=ToyData(batch_size_per_device=4))
    assert module.lr_factor == pytest.approx(factor)
    assert [g["lr"] for g in trainer.optimizers[0].param_groups] == pytest.approx([1e-3 * factor] * 2)


def test_what_was_scaled_is_printed_and_logged(tmp_path, caplog):
    class Logger:
        def __init__(self) -> None:
            self.params = {}

        def log_hyperparams(self, params) -> None:
            self.params |= params

    class FakeTrainer:
        world_size, accumulate_grad_batches, datamodule, loggers = 8, 4, ToyData(), [Logger()]

    with caplog.at_level("INFO"):
        LRScaling(16, "sqrt").setup(FakeTrainer(), toy_module(), "fit")
    assert "effective batch 128 = 8 ranks x 4 x 4 accumulated, reference 16, factor 2.82843" in caplog.text
    assert FakeTrainer.loggers[0].params["lr_scaling/effective_batch_size"] == 128


def run(tmp_path, batch_size: int, ckpt_path=None, **arguments):
    trainer = toy_trainer(tmp_path, callbacks=[LRScaling(16, "linear", **arguments)], max_epochs=2 if ckpt_path else 1)
    trainer.fit(toy_module(), datamodule=ToyData(batch_size_per_device=batch_size), ckpt_path=ckpt_path)
    return trainer


def test_a_resumed_run_with_another_batch_stops_unless_that_is_allowed(tmp_path):
    checkpoint = tmp_path / "run.ckpt"
    run(tmp_path, 4).save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="started with 4 samples per optimiser step and would resume with 8"):
        run(tmp_path, 8, checkpoint)
    assert run(tmp_path, 8, checkpoint, allow_batch_change=True).global_step == 8
    assert run(tmp_path, 4, checkpoint).global_step == 8


def test_an_unknown_rule_is_refused_at_once():
    with pytest.raises(ValueError, match="none, linear, sqrt, got 'square'"):
        LRScaling(16, "square")
