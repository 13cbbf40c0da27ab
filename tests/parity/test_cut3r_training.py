"""CUT3R's optimiser steps, truncated back-propagation and schedule against numbers recorded from the released code."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from cut3r_cases import log_length, recorded_targets
from parity_tools import load_case, relative_error
from restrike.losses.recurrent import RecurrentTargets, recurrent_loss
from restrike.models import build
from restrike.models.cut3r.truncation import chunks_of, run_chunk
from restrike.optim import clip_gradients, create_optimizer, make_schedule, param_groups
from tiny_cut3r import tiny_cut3r

LOSSES = 1e-4
GRADIENTS = 1e-3
STEPS = 5e-3  # AdamW's first steps are signs
LR = 1e-5
CONF = Path(__file__).parents[2] / "conf" / "freeze" / "cut3r_encoder.yaml"
FROZEN = yaml.safe_load(CONF.read_text())["callbacks"]["staged_freezing"]["init_args"]["stages"][0]


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer("adamw", param_groups(net, 0.05), LR, 0.0, (0.9, 0.95), 1e-8)


def targets_of(tag: str, views: int, batch: int, size: tuple[int, int], metric: list[bool]) -> RecurrentTargets:
    meta = {"tag": tag, "V": views, "B": batch, "H": size[0], "W": size[1], "flags": {"metric": metric}}
    return recorded_targets(meta)


def moved(net: nn.Module, start: dict[str, Tensor], want: dict[str, Any]) -> dict[str, float]:
    """Errors of the recorded changes of weights that are beyond the tolerance."""
    now = net.state_dict()
    names = [n.removeprefix("delta/") for n in want if n.startswith("delta/")]
    errors = {n: relative_error((now[n] - start[n]) / LR, want[f"delta/{n}"]) for n in names}
    return {n: e for n, e in errors.items() if not e <= STEPS}


def copy_of(net: nn.Module) -> dict[str, Tensor]:
    return {n: x.clone() for n, x in net.state_dict().items()}


def test_three_steps_through_all_views():
    meta, want = load_case("cut3r", "train_steps_linear")
    net = tiny_cut3r().train()
    start, optimizer, got = copy_of(net), optimizer_of(net), {}
    for step in range(meta["steps"]):
        targets = targets_of(f"cut3r/tv/s{step}", 4, 2, (32, 48), meta["flags"]["metric"])
        parts = recurrent_loss(net(targets.images), targets, is_mixed=False)
        optimizer.zero_grad()
        parts["loss"].backward()
        got |= {f"loss{step}": parts["loss"], f"pose_loss{step}": parts["loss_pose"]}
        got[f"gradnorm{step}"] = clip_gradients(net.parameters(), 1.0)
        if step == 0:
            clipped = {f"clipped_grad0/{n}": p.grad.clone() for n, p in net.named_parameters()}
        optimizer.step()
    assert {n: e for n, x in got.items() if (e := relative_error(x, want[n])) > LOSSES} == {}
    recorded = [n for n in want if n.startswith("clipped_grad0/")]
    assert {n: e for n in recorded if (e := relative_error(clipped[n], want[n])) > GRADIENTS} == {}
    assert moved(net, start, want) == {}


def test_truncated_back_propagation():
    meta, want = load_case("cut3r", "tbptt_linear")
    net = tiny_cut3r().train()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(f"net.{name}", glob) for glob in FROZEN))
    start, optimizer = copy_of(net), optimizer_of(net)
    targets = targets_of("cut3r/bv", 12, 1, (32, 32), meta["flags"]["metric"])
    with torch.no_grad():
        encoded, carry = net.encode(targets.images), net.start(1)
    losses, norms, got = [], [], {}
    for chunk in chunks_of(12, size=meta["chunk_size"], trained=4):
        predictions, carry = run_chunk(net, encoded, carry, chunk)
        loss = recurrent_loss(predictions, targets.views(chunk.start, chunk.stop))["loss"]
        losses.append(loss.detach())
        for i in range(chunk.start, chunk.stop):
            points = predictions.points_camera[:, i - chunk.start]
            got[f"view{i}.camera_pose"] = predictions.poses[:, i - chunk.start]
            got[f"view{i}.pts3d_in_self_view_log"] = log_length(points)
        if chunk.is_trained:
            optimizer.zero_grad()
            loss.backward()
            norms.append(clip_gradients(net.parameters(), 1.0))
            optimizer.step()
    got |= {"mean_loss": torch.stack(losses).mean(), "chunk_losses": torch.stack(losses)}
    got["grad_norms"] = torch.stack(norms)
    assert {n for n in want if not n.startswith("delta/")} == got.keys()
    assert {n: e for n, x in got.items() if (e := relative_error(x, want[n])) > GRADIENTS} == {}
    assert moved(net, start, want) == {}


def test_learning_rates_of_all_recipes():
    meta, want = load_case("cut3r", "lr_schedule")
    per_epoch, shares = 10000, np.array(meta["epochs_fraction_of_total"])
    for name, setting in meta["settings"].items():
        total = setting["epochs"] * per_epoch
        schedule = make_schedule(
            "progress_cosine",
            lr=setting["lr"],
            min_lr=setting["min_lr"],
            warmup_lr=0.0,
            warmup_steps=round(setting["warmup_epochs"] * per_epoch),
            total_steps=total,
        )
        got = torch.tensor([1e6 * schedule(1 + round(share * total)) for share in shares])
        assert relative_error(got, want[name]) < 1e-6


@pytest.mark.parametrize("name, count", [("cut3r_224_linear", 418_574_343), ("cut3r_512_dpt", 463_438_546)])
def test_with_the_encoder_frozen_as_many_parameters_train_as_published(name, count):
    with torch.device("meta"):
        named = build(name).named_parameters()
    sizes = [p.numel() for n, p in named if not any(fnmatchcase(f"net.{n}", glob) for glob in FROZEN)]
    assert sum(sizes) == count
