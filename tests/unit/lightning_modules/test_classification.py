"""The classification module: losses, schedule, clipping, evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import EMA, MESA, FiniteGuard, StepSeed, Throughput
from lightning_modules import ClassificationModule
from lightning_modules.networks import build_network, compile_network
from restrike.losses import binary_cross_entropy, cross_entropy
from restrike.optim import warmup_cosine
from training_tools import NUM_CLASSES, ToyData, differing, make_batch, toy_module, toy_trainer, weights


class Recorder(Callback):
    """What each step logged, and the learning rate that it used."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.lrs: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.lrs.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, *_) -> None:
        self.steps.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def fit(module: ClassificationModule, root: Path, data: ToyData | None = None, **settings) -> Recorder:
    recorder = Recorder()
    callbacks = [recorder, *settings.pop("callbacks", [])]
    toy_trainer(root, callbacks=callbacks, **settings).fit(module, datamodule=data or ToyData())
    return recorder


@pytest.mark.parametrize("name, function", [("ce", cross_entropy), ("bce", binary_cross_entropy)])
def test_loss_is_the_targets_plus_every_registered_term(name, function):
    module, batch = toy_module(loss=name, label_smoothing=0.1), make_batch(0)
    logged = {}
    module.log_dict = lambda values, **_: logged.update(values)
    module.loss_terms["extra"] = lambda owner, batch, logits: 2 * logits.square().mean()
    loss = module.training_step(batch, 0)
    logits = module(batch.images)
    expected = function(logits, batch.targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected + 2 * logits.square().mean())
    torch.testing.assert_close(logged[f"train/loss_{name}"], expected.detach())
    assert logged.keys() == {"train/loss", f"train/loss_{name}", "train/loss_extra"}
    assert not logged["train/loss"].requires_grad


def test_training_lowers_the_loss(tmp_path):
    recorder = fit(toy_module(), tmp_path, ToyData(batch_size_per_device=16), max_epochs=6)
    losses = [step["train/loss"] for step in recorder.steps]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_channels_last_and_precisions_train(tmp_path, precision):
    recorder = fit(toy_module(channels_last=True), tmp_path, max_epochs=1, precision=precision)
    assert len(recorder.steps) == 4 and all(0 < s["train/loss"] < 10 for s in recorder.steps)


def test_learning_rates_follow_the_schedule_through_the_trainer(tmp_path):
    settings = {"schedule": "warmup_cosine", "lr": 0.1, "warmup_lr": 0.01, "min_lr": 0.001}
    module = toy_module(**settings, warmup_epochs=1, schedule_epochs=4)
    module.lr_factor = 2.0
    recorder = fit(module, tmp_path, max_epochs=5, accumulate_grad_batches=2)
    schedule = {"lr": 0.1, "total_steps": 8, "warmup_steps": 2, "warmup_lr": 0.01, "min_lr": 0.001}
    assert recorder.lrs == pytest.approx([2 * warmup_cosine(step, **schedule) for step in range(1, 11)])


def test_an_epoch_of_the_schedule_can_have_a_fixed_length(tmp_path):
    module = toy_module(schedule="cosine", lr=0.1, schedule_epochs=1, schedule_steps_per_epoch=8)
    assert fit(module, tmp_path, max_epochs=1).lrs[-1] == pytest.approx(0.05)  # half way after 4 steps
    module = toy_module(schedule="cosine", lr=0.1, warmup_steps=2, schedule_steps=6)
    assert fit(module, tmp_path, max_epochs=1).lrs == pytest.approx([0.05, 0.1, 0.0853553, 0.05])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"warmup_epochs": 1, "warmup_steps": 5}, "model.warmup_epochs=1 and model.warmup_steps=5"),
        ({"schedule": "cosine", "warmup_epochs": 3}, "lower warmup_epochs"),
        ({"num_classes": 7}, "model.num_classes is 7, but the data has 4"),
        ({"evaluate": "ema"}, "add callbacks.ema"),
    ],
)
def test_contradictions_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(toy_module(**arguments), tmp_path, max_epochs=2)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_gradient_norm_is_logged_and_clipped(tmp_path, clip):
    class Norms(Callback):
        before, after = [], []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.before.append(float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()])))

        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                self.after.append(float(torch.nn.utils.get_total_norm(grads)))

    norms = Norms()
    norms.before, norms.after = [], []
    recorder = fit(toy_module(), tmp_path, callbacks=[norms], max_epochs=1, gradient_clip_val=clip)
    assert [step["train/grad_norm"] for step in recorder.steps] == pytest.approx(norms.before)
    expected = norms.before if clip is None else [clip] * len(norms.before)
    assert norms.after == pytest.approx(expected[:-1], rel=1e-4)  # gradients stay until the next step


class CountSyncs(TorchDispatchMode):
    """Counts what would make a host wait for its device: reading a scalar, and shapes that depend on data."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("guards, per_step", [([], 0), ([FiniteGuard], 1)])
def test_a_step_waits_for_the_device_only_in_the_finite_guard(tmp_path, guards, per_step):
    module = toy_module(optimizer="sgd")  # Adam keeps its step counts on the host and reads them there
    callbacks = [EMA(0.9), MESA(1.0, start_ratio=-1.0), StepSeed(0), Throughput(), *(guard() for guard in guards)]
    settings = {"max_epochs": 3, "log_every_n_steps": 10**6, "limit_val_batches": 0, "gradient_clip_val": 1.0}
    trainer = toy_trainer(tmp_path, callbacks=callbacks, **settings)
    with CountSyncs() as syncs:
        trainer.fit(module, datamodule=ToyData())
    # Once per run and epoch Lightning itself reads a few; the steps must add nothing but the guard's one.
    assert trainer.global_step * per_step <= syncs.count < trainer.global_step * per_step + 8


def test_validation_measures_both_kinds_of_weights_over_valid_rows(tmp_path):
    module = toy_module()
    trainer = toy_trainer(tmp_path, callbacks=[EMA(0.5)], max_epochs=1)
    data = ToyData()
    trainer.fit(module, datamodule=data)
    batches = [make_batch(10_000), make_batch(10_001, num_padding=1)]
    images = torch.cat([b.images[b.valid] for b in batches])
    targets = torch.cat([b.targets[b.valid] for b in batches])
    for suffix, net in (("", module.net), ("_ema", module.averaged())):
        with torch.no_grad():
            logits = net.eval()(images)
        metrics = trainer.callback_metrics
        torch.testing.assert_close(metrics[f"val/loss{suffix}"], cross_entropy(logits, targets))
        assert metrics[f"val/top1{suffix}"] == (logits.argmax(1) == targets).float().mean()
        assert metrics[f"val/top5{suffix}"] == 1


@pytest.mark.parametrize("evaluate, has_raw, has_ema", [("raw", True, False), ("ema", False, True)])
def test_the_weights_to_evaluate_are_an_option(tmp_path, evaluate, has_raw, has_ema):
    trainer = toy_trainer(tmp_path, callbacks=[EMA(0.5)], max_epochs=1)
    module = toy_module(evaluate=evaluate)
    trainer.fit(module, datamodule=ToyData())
    trainer.test(module, datamodule=ToyData(), verbose=False)
    assert ("test/top1" in trainer.callback_metrics, "test/top1_ema" in trainer.callback_metrics) == (has_raw, has_ema)


def test_predict_returns_the_most_probable_classes_of_valid_rows(tmp_path):
    module = toy_module()
    predictions = toy_trainer(tmp_path).predict(module, datamodule=ToyData())
    assert [len(p["keys"]) for p in predictions] == [4, 3]
    probabilities = module.eval()(make_batch(10_000).images).softmax(dim=1)
    torch.testing.assert_close(predictions[0]["probabilities"][:, 0], probabilities.max(dim=1).values)
    assert torch.equal(predictions[0]["classes"][:, 0], probabilities.argmax(dim=1))
    assert predictions[0]["keys"][0] == "10000-0"


@pytest.mark.parametrize("scope, compiled", [("blocks", 4), ("net", 1)])
@torch.no_grad()
def test_compiling_keeps_names_and_results(scope, compiled):
    module, images = toy_module().eval(), make_batch(0).images
    expected, names = module(images), list(module.state_dict())
    assert compile_network(module.net, scope, backend="eager") == compiled
    torch.testing.assert_close(module(images), expected)
    assert list(module.state_dict()) == names


def test_compiling_blocks_of_a_net_without_blocks_is_an_error():
    with pytest.raises(ValueError, match="no container named.*use compile='net'"):
        compile_network(torch.nn.Linear(2, 2), "blocks")


@pytest.mark.parametrize(
    "name, arguments, message",
    [("resnet5O", {}, "did you mean 'resnet50"), ("test_resnet", {"numclasses": 3}, "refused its arguments")],
)
def test_bad_models_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_network(name, **arguments)


def test_drop_path_rate_and_model_args_reach_the_model():
    module = toy_module(model_name="test_vit", model_args={"img_size": 32}, drop_path_rate=0.5)
    rates = [m.drop_prob for m in module.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == 0.5
    assert module(torch.zeros(1, 3, 32, 32)).shape == (1, NUM_CLASSES)


def test_the_average_is_no_part_of_the_module(tmp_path):
    plain, module = toy_module(), toy_module()
    toy_trainer(tmp_path, callbacks=[EMA()], max_steps=1).fit(module, datamodule=ToyData())
    assert weights(plain).keys() == weights(module).keys()
    assert differing(weights(module.net), weights(module.averaged()))
    assert len(list(module.parameters())) == len(list(plain.parameters()))
