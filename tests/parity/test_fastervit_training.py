"""Losses, optimisers, schedule and EMA against numbers recorded from the FasterViT release."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parity_tools import fill_, imagenet_image, load_case, normal, relative_error
from restrike.losses import cross_entropy, mesa_loss
from restrike.optim import WeightAverage, clip_gradients, create_optimizer, lr_scheduler, make_schedule, param_groups

EXACT = 1e-6
# The loose ones are inherent: parameters without gradient walk at random under Adam, and the eval-mode teacher sees
# them through lagging running means.
MESA4 = {"loss": 5e-3, "loss_kd": 5e-3, "teacher_logits": 5e-3, "grad_norm": 1e-4, "after": 5e-4, "ema": 5e-4}


def test_mesa_loss_and_its_gradient():
    meta, recorded = load_case("fastervit", "mesa_loss")
    student = (2.0 * normal("fv.mesaloss.student", 8, 1000)).requires_grad_()
    teacher = 2.0 * normal("fv.mesaloss.teacher", 8, 1000)
    targets = (2 * normal("fv.mesaloss.t", 8, 1000)).softmax(dim=1)
    ce, kd = cross_entropy(student, targets), mesa_loss(student, teacher)
    total = ce + meta["constructor"]["ratio"] * kd
    total.backward()
    got = {"ce": ce, "kd": kd, "total": total, "grad_student": student.grad}
    assert {name: relative_error(value, recorded[name]) for name, value in got.items()} == pytest.approx(
        dict.fromkeys(recorded, 0.0), abs=EXACT
    )


def test_ema_sequence():
    meta, recorded = load_case("fastervit", "ema_decay_09998")
    net = fill_(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    average, steps = WeightAverage(net, meta["constructor"]["decay"]), []
    for step in range(meta["constructor"]["steps"]):
        with torch.no_grad():
            for name, tensor in net.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(normal(f"fv.ema.{step}.{name}", *tensor.shape))
        average.update()
        values = [t for t in average.state_dict().values() if t.is_floating_point()]
        steps.append(torch.cat([t.flatten() for t in values]))
    assert relative_error(torch.stack(steps), recorded["ema"]) < EXACT


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_optimizer_trace(name: str):
    meta, recorded = load_case("fastervit", f"{name}_10_steps")
    c = meta["constructor"]
    net = nn.ParameterDict({key: 0.5 * normal(f"fv.{name}.p.{key}", *shape) for key, shape in c["shapes"].items()})
    nn.init.zeros_(net["w_zero"])
    groups = param_groups(net, c["weight_decay"])
    optimizer = create_optimizer(name, groups, lr=c["lr per step"][0], betas=tuple(c["betas"]), eps=c["eps"])
    scheduler = lr_scheduler(optimizer, lambda step: c["lr per step"][min(step, 10) - 1], lr=c["lr per step"][0])
    trace, norms = [], []
    for step, scale in enumerate(c["gradient scale per step"]):
        for key, parameter in net.items():
            parameter.grad = scale * normal(f"fv.{name}.g{step}.{key}", *parameter.shape)
        norms.append(clip_gradients(net.parameters(), c["clip_grad_norm"]))
        optimizer.step()
        scheduler.step()
        trace.append(torch.cat([net[key].detach().flatten() for key in c["shapes"]]))
    assert relative_error(torch.stack(norms), recorded["grad_norm"]) < EXACT
    assert relative_error(torch.stack(trace), recorded["params"]) < EXACT


def test_learning_rate_at_every_recorded_update():
    meta, recorded = load_case("fastervit", "lr_recipe_0_1_2_4_5_6")
    c = meta["constructor"]
    per_epoch = c["data_len"] // (c["batch_size"] * c["world_size"])
    schedule = make_schedule(
        "warmup_cosine",
        lr=c["lr"],
        total_steps=c["epochs"] * per_epoch,
        warmup_steps=c["warmup_epochs"] * per_epoch,
        warmup_lr=c["warmup_lr"],
        min_lr=c["min_lr"],
    )
    rates = torch.tensor([schedule(int(t)) for t in recorded["t"]])
    assert relative_error(rates, recorded["lr"]) < EXACT
    assert ((rates - torch.from_numpy(recorded["lr"])).abs() / rates).max() < EXACT
    assert recorded["t"].max() > c["epochs"] * per_epoch, "the case covers the cooldown"


def test_four_steps_with_an_ema_teacher():
    from restrike.models import build

    meta, recorded = load_case("fastervit", "mesa4_tiny")
    net = fill_(build("faster_vit_0_224", **meta["constructor"])).train()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("pos_emb_funct.cpb_mlp.2.weight"):
                parameter.copy_(-parameter.abs())
    average = WeightAverage(net, 0.9)
    optimizer = create_optimizer("adamw", param_groups(net, 0.05), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    got: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("loss", "loss_ce", "loss_kd", "grad_norm", "teacher_logits")
    }
    errors = {}
    for step in range(4):
        images, targets = _mesa_batch(step)
        with torch.no_grad():
            teacher = average.module(images)
        logits = net(images)
        ce, kd = cross_entropy(logits, targets), mesa_loss(logits, teacher)
        optimizer.zero_grad()
        (ce + kd).backward()
        if step == 0:
            errors["logits_step0_train"] = relative_error(logits, recorded["logits_step0_train"])
            for name, parameter in net.named_parameters():
                if f"grad0.{name}" in recorded:
                    errors[f"grad0.{name}"] = relative_error(parameter.grad, recorded[f"grad0.{name}"])
        norm = clip_gradients(net.parameters(), 5.0)
        optimizer.step()
        average.update()
        _truncate_indices(average.module, net)
        for name, value in zip(got, (ce + kd, ce, kd, norm, teacher), strict=True):
            got[name].append(value.detach())
    images, targets = _mesa_batch(0)
    errors |= {name: relative_error(torch.stack(values), recorded[name]) for name, values in got.items()}
    errors["loss_after"] = relative_error(cross_entropy(net(images), targets), recorded["loss_after"])
    for prefix, state in (("after", net.state_dict()), ("ema", average.state_dict())):
        names = [name for name in recorded if name.startswith(f"{prefix}.")]
        errors |= {name: relative_error(state[name.removeprefix(f"{prefix}.")], recorded[name]) for name in names}
    assert errors.keys() == recorded.keys()
    too_large = {name: e for name, e in errors.items() if e > MESA4.get(name, MESA4.get(name.split(".")[0], 1e-4))}
    assert not too_large


@torch.no_grad()
def _truncate_indices(averaged: nn.Module, net: nn.Module) -> None:
    """A defect of the release that the case holds: it averages integers in float and truncates them.

    At this case's decay of 0.9 that moves 15 of 49 position indices of the teacher down by one, and its logits by 3 %.
    At the recipes' 0.9998 it moves none at any window size, so Restrike leaves the indices alone.
    """
    for (name, average), value in zip(averaged.named_buffers(), net.buffers(), strict=True):
        if name.endswith("relative_position_index"):
            average.copy_(average * 0.9 + (1 - 0.9) * value)


def _mesa_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    targets = (2 * normal(f"fv.mesa.t{step}", 8, 10)).softmax(dim=1)
    return imagenet_image(f"fv.mesa.x{step}", 8, 3, 128, 128), targets
