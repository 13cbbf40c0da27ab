"""A NaN leaves no trace."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from callbacks import EMA, MESA, FiniteGuard, NonFiniteGradientError
from training_tools import ToyData, differing, toy_module, toy_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:gradient norm is (nan|inf)")


def train(tmp_path, optimizer, callbacks, **data):
    module = toy_module(optimizer=optimizer)
    trainer = toy_trainer(tmp_path, callbacks=callbacks, max_epochs=2, limit_val_batches=0, gradient_clip_val=1.0)
    trainer.fit(module, datamodule=ToyData(**data))
    return module, trainer


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("position", [0, 2])
def test_a_skipped_step_is_as_if_its_batch_had_never_come(tmp_path, optimizer, position):
    guard, order = FiniteGuard(), [0, 1, 2, 3]
    poisoned = (position, 100 + position)  # in both epochs
    guarded, trainer = train(tmp_path, optimizer, [guard], order=order, poison=poisoned)
    clean, reference = train(tmp_path, optimizer, [], order=[i for i in order if i != position])
    assert not differing(weights(guarded), weights(clean))
    assert (guard.skipped, guard.consecutive) == (2, 0)
    assert (trainer.global_step, reference.global_step) == (8, 6)
    states = [t.optimizers[0].state_dict()["state"] for t in (trainer, reference)]
    for name, entry in states[1].items():
        assert not differing(
            {k: v for k, v in states[0][name].items() if isinstance(v, torch.Tensor)},
            {k: v for k, v in entry.items() if isinstance(v, torch.Tensor)},
        )


def test_without_the_guard_a_nan_does_reach_the_weights(tmp_path):
    module, _ = train(tmp_path, "sgd", [], poison=(1,))
    assert torch.isnan(module.net.fc.weight).any()


def test_without_keeping_buffers_batch_norm_is_poisoned(tmp_path):
    module, _ = train(tmp_path, "sgd", [FiniteGuard(keep_buffers=False)], poison=(1,))
    assert torch.isfinite(module.net.fc.weight).all()
    assert any(torch.isnan(b).any() for name, b in module.net.named_buffers() if name.endswith("running_mean"))


def test_accumulated_steps_are_skipped_whole(tmp_path):
    guard, module = FiniteGuard(), toy_module()
    trainer = toy_trainer(tmp_path, callbacks=[guard], max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=ToyData(poison=(0,)))
    clean = toy_module()
    toy_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(clean, datamodule=ToyData(order=[2, 3]))
    assert guard.skipped == 1 and not differing(weights(module), weights(clean))


def test_stopping_names_the_samples_and_leaves_the_weights(tmp_path):
    module = toy_module()
    before = weights(module)
    with pytest.raises(
        NonFiniteGradientError, match=r"nan at step 0 \(epoch 0, rank 0\).*samples 0-0, 0-1, 0-2, 0-3 is"
    ):
        toy_trainer(tmp_path, callbacks=[FiniteGuard("stop")]).fit(module, datamodule=ToyData(poison=(0,)))
    assert not differing(weights(module), before), "a checkpoint of the stopped run is sound"


def test_too_many_in_a_row_stop_the_run(tmp_path):
    guard = FiniteGuard(max_consecutive=2)
    with pytest.raises(NonFiniteGradientError, match="3 in a row of 2 allowed"):
        toy_trainer(tmp_path, callbacks=[guard]).fit(toy_module(), datamodule=ToyData(poison=(0, 1, 2)))
    assert guard.skipped == 3


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # torch's, where the first step is skipped
def test_under_a_gradient_scaler_overflow_is_counted_and_the_average_moves_on(tmp_path):
    """The scaler starts far too high, skips until it has come down, and the run goes on."""
    guard, ema, module = FiniteGuard(), EMA(0.9), toy_module()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-20)
    callbacks = [MESA(1.0, start_ratio=-1.0), guard, ema]
    settings = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "gradient_clip_val": 1.0}
    trainer = toy_trainer(tmp_path, callbacks=callbacks, max_epochs=1, **settings)
    before = weights(module)
    trainer.fit(module, datamodule=ToyData())
    assert 1 <= guard.skipped <= 3 and trainer.global_step == 4
    assert differing(weights(module), before) and scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(t).all() for t in [*weights(module).values(), *weights(ema.shadow()).values()])


def test_counts_are_kept_in_the_checkpoint():
    guard = FiniteGuard()
    guard.load_state_dict({"skipped": 5, "consecutive": 1})
    assert guard.state_dict() == {"skipped": 5, "consecutive": 1}


def test_a_wrong_action_is_refused():
    with pytest.raises(ValueError, match="skip or stop, got 'ignore'"):
        FiniteGuard("ignore")
