"""MESA starts when it should, and its teacher is the average as it stands."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import EMA, MESA
from restrike.losses import mesa_loss
from training_tools import ToyData, make_batch, toy_module, toy_trainer


@pytest.mark.parametrize("start_ratio, first", [(0.25, 78), (0.3, 94), (0.0, 1)])
def test_first_epoch_of_the_recipes(start_ratio, first):
    mesa = MESA(ratio=0.1, start_ratio=start_ratio, schedule_epochs=310)
    assert [mesa.is_active(epoch) for epoch in (first - 1, first, 319)] == [False, True, True]


@pytest.mark.parametrize("order", [(EMA, MESA), (MESA, EMA)])
def test_the_teacher_runs_from_the_start_epoch_on_and_not_before(tmp_path, order):
    forwards: dict[int, int] = {}
    terms: dict[int, float] = {}

    class Spy(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            def count(net, args, output) -> None:
                if trainer.training:
                    assert not net.training and not output.requires_grad
                    forwards[trainer.current_epoch] = forwards.get(trainer.current_epoch, 0) + 1

            pl_module.averaged().register_forward_hook(count)

        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            if "train/loss_mesa" in trainer.callback_metrics:
                terms[trainer.current_epoch] = float(trainer.callback_metrics["train/loss_mesa"])

    made = {EMA: EMA(0.9), MESA: MESA(ratio=2.0, start_ratio=0.25, schedule_epochs=4)}
    module = toy_module()
    callbacks = [made[order[0]], made[order[1]], Spy()]
    toy_trainer(tmp_path, callbacks=callbacks, max_epochs=4).fit(module, datamodule=ToyData())
    assert forwards == {2: 4, 3: 4}, "epochs 0 and 1 are at 0 and 0.25 of the schedule"
    assert terms.keys() == {2, 3} and all(value > 0 for value in terms.values())
    assert not module.loss_terms, "the module is left as it was"


def test_the_term_is_weighted_and_sends_gradient_to_the_student_alone():
    module, mesa, batch = toy_module().eval(), MESA(ratio=0.5, temperature=2.0, weight=10.0), make_batch(0)
    teacher = toy_module().net.eval()
    torch.nn.init.normal_(teacher.fc.weight)
    module.averaged = lambda: teacher
    logits = module(batch.images)
    term = mesa.term(module, batch, logits)
    torch.testing.assert_close(term, 0.5 * mesa_loss(logits, teacher(batch.images), temperature=2.0, weight=10.0))
    term.backward()
    assert module.net.fc.weight.grad is not None and teacher.fc.weight.grad is None


def test_mesa_without_ema_is_an_error_that_says_what_to_add(tmp_path):
    with pytest.raises(ValueError, match="add callbacks.ema"):
        toy_trainer(tmp_path, callbacks=[MESA(1.0)]).fit(toy_module(), datamodule=ToyData())
