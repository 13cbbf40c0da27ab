"""EMA through the trainer: sequence, checkpoint, restore."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from callbacks import EMA
from restrike.optim import WeightAverage
from training_tools import ToyData, differing, make_batch, toy_module, toy_trainer, weights


class ByHand(Callback):
    """The average as its definition says, from weights after each optimiser step."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.average, self.step = WeightAverage(pl_module.net, 0.9), 0

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.average.update()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_moves_once_per_optimiser_step(tmp_path, accumulate):
    ema, by_hand, module = EMA(0.9), ByHand(), toy_module()
    settings = {"accumulate_grad_batches": accumulate, "max_epochs": 1}
    toy_trainer(tmp_path, callbacks=[ema, by_hand], **settings).fit(module, datamodule=ToyData())
    assert by_hand.step == 4 // accumulate
    assert not differing(weights(ema.shadow()), weights(by_hand.average.module))
    assert differing(weights(ema.shadow()), weights(module.net))


def test_the_checkpoint_holds_raw_weights_and_the_average_apart(tmp_path):
    ema, module = EMA(0.9), toy_module()
    trainer = toy_trainer(tmp_path, callbacks=[ema], max_epochs=1)
    trainer.fit(module, datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert not differing(saved["callbacks"]["EMA"]["shadow"], weights(ema.shadow()))
    assert not differing(saved["state_dict"], weights(module))
    assert "rank_buffers" not in saved["callbacks"]["EMA"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_restores_the_average(tmp_path, command):
    ema = EMA(0.5)
    trainer = toy_trainer(tmp_path, callbacks=[ema], max_epochs=1)
    trainer.fit(toy_module(), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    fresh = toy_trainer(tmp_path, callbacks=[EMA(0.5)])
    getattr(fresh, command)(toy_module(), datamodule=ToyData(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    stage = {"validate": "val"}.get(command, command)
    for name in ("loss", "loss_ema"):
        assert fresh.callback_metrics[f"{stage}/{name}"] == trainer.callback_metrics[f"val/{name}"]
    assert fresh.callback_metrics[f"{stage}/loss"] != fresh.callback_metrics[f"{stage}/loss_ema"]


def test_testing_after_a_fit_uses_the_average_of_that_fit(tmp_path):
    ema, module = EMA(0.5), toy_module()
    trainer = toy_trainer(tmp_path, callbacks=[ema], max_epochs=1)
    trainer.fit(module, datamodule=ToyData())
    before = weights(ema.shadow())
    trainer.test(module, datamodule=ToyData(), verbose=False)
    assert not differing(before, weights(ema.shadow()))
    assert "test/top1_ema" in trainer.callback_metrics


def test_without_a_history_no_averaged_metrics_are_reported(tmp_path):
    trainer = toy_trainer(tmp_path, callbacks=[EMA()])
    trainer.validate(toy_module(), datamodule=ToyData(), verbose=False)
    assert "val/top1" in trainer.callback_metrics and "val/top1_ema" not in trainer.callback_metrics


def test_the_average_starts_from_the_weights_at_fit_start(tmp_path):
    class ChangeWeights(Callback):
        """As DDP's broadcast does: after setup, before on_fit_start."""

        def on_fit_start(self, trainer, pl_module) -> None:
            torch.nn.init.ones_(pl_module.net.conv1[0].weight)

    ema, module = EMA(1.0), toy_module()
    callbacks = [ChangeWeights(), ema]
    toy_trainer(tmp_path, callbacks=callbacks, max_steps=1).fit(module, datamodule=ToyData())
    assert (ema.shadow().conv1[0].weight == 1).all()


def test_a_second_module_gets_its_own_average(tmp_path):
    ema, first, second = EMA(1.0), toy_module(), toy_module()
    torch.nn.init.ones_(second.net.conv1[0].weight)
    for module in (first, second):
        toy_trainer(tmp_path, callbacks=[ema], max_steps=1).fit(module, datamodule=ToyData())
    assert (ema.shadow().conv1[0].weight == 1).all() and second.averaged() is ema.shadow()


def test_the_average_of_fastervit_gives_fresh_positional_terms(tmp_path):
    """Its positional terms are cached per weight version, and the update is in place."""
    arguments = {"dim": 8, "in_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 2]}
    sizes = {"resolution": 64, "window_size": [7, 7, 2, 2]}
    module = toy_module(model_name="faster_vit_0_224", model_args={**arguments, **sizes}, lr=0.1)
    images = make_batch(0, image_size=64).images
    average = WeightAverage(module.net, 0.5)
    with torch.no_grad():
        before = average.module(images)
        for parameter in module.net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        average.update()
        after = average.module(images)
        fresh = toy_module(model_name="faster_vit_0_224", model_args={**arguments, **sizes}).net.eval()
        fresh.load_state_dict(average.module.state_dict())
        torch.testing.assert_close(after, fresh(images))
    assert not torch.allclose(before, after)


def test_a_module_that_cannot_take_an_average_is_named(tmp_path):
    class Other(LightningModule):
        pass

    with pytest.raises(ValueError, match="callbacks.ema needs averaged, net of Other"):
        EMA().setup(toy_trainer(tmp_path), Other(), "fit")
