"""VGGT's losses, gradients, optimiser steps and schedule against numbers recorded from the released code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parity_tools import image, load_case, normal, relative_error
from restrike.geometry import encode_pose_fov
from restrike.losses import (
    LossWeights,
    MultiViewTargets,
    camera_loss,
    dense_loss,
    multiview_loss,
    nearest_rank_quantile,
    quantile_filter,
)
from restrike.optim import create_optimizer
from restrike.optim.module_clipping import clip_by_module
from restrike.optim.progress import linear_warmup_cosine
from tiny_vggt import CAMERA_DEPTH, recorded_targets, tiny_vggt

TOLERANCE = 1e-4
TIGHT = 1e-5
STEPS = 2e-2  # AdamW's first steps are signs
PARTS = ("conf", "reg", "grad")
SURFACES = {"depth": ("", "grad", "grad_conf"), "point": ("", "grad", "grad_conf", "normal", "normal_conf")}


def error(got: Tensor, want: np.ndarray) -> float:
    """Relative error; what was recorded as 0 has to be 0."""
    if not np.any(want):
        return float(got.detach().abs().max())
    return relative_error(got, want)


def named(prefix: str, loss: Any, kind: str) -> dict[str, Tensor]:
    """A loss's parts under the names of the case."""
    if kind == "camera":
        names, values = ("T", "R", "FL", "camera"), (*loss, loss.total)
    else:
        names, values = tuple(f"{part}_{kind}" for part in PARTS), tuple(loss)
    return {f"{prefix}_loss_{name}": value for name, value in zip(names, values, strict=True)}


@pytest.fixture(scope="module")
def predictions() -> dict[str, Any]:
    targets, shape = loss_targets(), (2, 3, 28, 42)
    offset = 0.1 * normal("loss-vis-pd", *shape, 1)
    offset = offset + 5 * (offset > 0.25)
    encoding = encode_pose_fov(targets.world_to_camera, targets.intrinsics, shape[2:])
    encodings = [encoding + 0.3 * normal(f"loss-vis-pe{i}", 2, 3, 9) for i in range(4)]
    maps = {
        "depth": targets.depth[..., None] + offset,
        "depth_conf": 1 + torch.exp(0.5 * normal("loss-vis-pc", *shape)),
        "world_points": targets.points_world + 0.1 * normal("loss-vis-pw", *shape, 3),
        "world_points_conf": 1 + torch.exp(0.5 * normal("loss-vis-pwc", *shape)),
    }
    for value in [*encodings, *maps.values()]:
        value.requires_grad_()
    return {**maps, "pose_enc_list": encodings}


def loss_targets() -> MultiViewTargets:
    return recorded_targets("loss-vis", 2, 3, 28, 42, is_scene=False)


def camera(predictions, targets, **arguments):
    encoding = encode_pose_fov(targets.world_to_camera, targets.intrinsics, (28, 42))
    return camera_loss(predictions["pose_enc_list"], encoding, targets.valid, **arguments)


def dense(predictions, targets, kind: str, surface: str, valid_range: float):
    name, target = ("depth", targets.depth[..., None]) if kind == "depth" else ("world_points", targets.points_world)
    confidence = predictions[f"{name}_conf"]
    return dense_loss(predictions[name], confidence, target, targets.valid, surface, valid_range)


def test_each_loss(predictions):
    _, want = load_case("vggt", "losses")
    targets = loss_targets()
    got: dict[str, Tensor] = {}
    for distance in ("l1", "l2"):
        got |= named(f"cam_{distance}", camera(predictions, targets, distance=distance), "camera")
    for kind, surfaces in SURFACES.items():
        for surface in surfaces:
            for valid_range in (-1, 0.9):
                loss = dense(predictions, targets, kind, surface, valid_range)
                got |= named(f"{kind}_[{surface}]_{valid_range}", loss, kind)
    recorded = {name for name in want if name.startswith(("cam_l", "depth_[", "point_["))}
    assert got.keys() == recorded
    assert {n: e for n in got if (e := error(got[n], want[n])) > TOLERANCE} == {}


def test_losses_of_spoilt_and_of_almost_empty_targets(predictions):
    _, want = load_case("vggt", "losses")
    spoilt, few = loss_targets(), loss_targets()
    spoilt.depth[:, 1, 3, 4], spoilt.depth[:, 0, 5, 6], spoilt.depth[0, 0, 7, 8] = torch.nan, torch.inf, 500
    spoilt.valid[0, 0] = False
    spoilt.valid[0, 0, :10, :10] = True
    few.valid[:] = False
    few.valid[0, 1, :9, :11] = True
    got = named("cam_sparse", camera(predictions, spoilt), "camera")
    got |= named("depth_bad", dense(predictions, spoilt, "depth", "grad", 0.98), "depth")
    got |= named("cam_few", camera(predictions, few), "camera")
    got |= named("depth_few", dense(predictions, few, "depth", "grad", 0.98), "depth")
    assert {n: e for n in got if (e := error(got[n], want[n])) > TOLERANCE} == {}


def test_the_objective_and_its_gradients(predictions):
    _, want = load_case("vggt", "losses")
    losses = multiview_loss(predictions, loss_targets(), LossWeights(camera=5, depth=1, point=1))
    names = ["depth", "depth_conf", "world_points", "world_points_conf"]
    inputs = [*(predictions[name] for name in names), *predictions["pose_enc_list"]]
    gradients = torch.autograd.grad(losses["loss"], inputs)
    got = {f"grad_{name}": gradient for name, gradient in zip(names, gradients, strict=False)}
    got |= {"grad_pose": torch.stack(gradients[4:]), "all_objective": losses["loss"]}
    got |= {"all_loss_camera": losses["loss_camera"], "all_loss_T": losses["loss_translation"]}
    got |= {"all_loss_R": losses["loss_rotation"], "all_loss_FL": losses["loss_fov"]}
    for kind in ("depth", "point"):
        for part, name in zip(PARTS, ("confidence", "regression", "gradient"), strict=True):
            got[f"all_loss_{part}_{kind}"] = losses[f"loss_{kind}_{name}"]
    recorded = {k: v for k, v in want.items() if k.startswith(("all_", "grad_"))}
    assert got.keys() == recorded.keys()
    assert {n: e for n in got if (e := error(got[n], want[n])) > TOLERANCE} == {}


def test_quantile_filter():
    _, want = load_case("vggt", "quantile")
    x, y = 30 * normal("q-vis", 5003).abs(), 80 * normal("q-visb", 900).abs()
    z = x.clone()
    z[::3] = 150

    def filtered(values: Tensor, quantile: float) -> Tensor:
        kept, keep = quantile_filter(values, torch.ones_like(values, dtype=torch.bool), quantile)
        return kept[keep]

    got = {name: nearest_rank_quantile(x, float(name[2:])) for name in want if name.startswith("q_")}
    got |= {"filtered": filtered(x, 0.98), "filtered_half": filtered(x, 0.1), "small": filtered(y, 0.98)}
    got["hardmax"] = filtered(z, 0.98)
    assert got.keys() == want.keys()
    assert {n: e for n in got if (e := error(got[n], want[n])) > TIGHT} == {}


def test_learning_rate_by_progress():
    meta, want = load_case("vggt", "lr_schedule")
    rates = [linear_warmup_cosine(where, lr=5e-5) for where in meta["input"]["where"]]
    assert relative_error(1e6 * torch.tensor(rates), want["co3d_finetune"]) < TIGHT


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_gradients_of_a_whole_training_pass(grad_checkpointing):
    meta, want = load_case("vggt", "train_gradients")
    model = tiny_vggt(**CAMERA_DEPTH, grad_checkpointing=grad_checkpointing, frames_per_chunk=4).train()
    targets = recorded_targets("tg-vis", 2, 3, 56, 70, is_scene=True)
    losses = multiview_loss(model(image("tg-vis-img", 2, 3, 3, 56, 70)), targets)
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {n for n, _ in model.named_parameters()} - gradients.keys() == set(meta["no_gradient"])
    got = {f"grad:{name}": gradient for name, gradient in gradients.items() if f"grad:{name}" in want}
    got["grad_norms"] = torch.stack([gradients[name].norm() for name in meta["grad_norm_names"]])
    got |= {"loss_camera": losses["loss_camera"], "loss_T": losses["loss_translation"], "objective": losses["loss"]}
    got |= {"loss_R": losses["loss_rotation"], "loss_FL": losses["loss_fov"]}
    for part, name in zip(PARTS, ("confidence", "regression", "gradient"), strict=True):
        got[f"loss_{part}_depth"] = losses[f"loss_depth_{name}"]
    assert got.keys() == want.keys()
    assert {n: e for n in got if (e := error(got[n], want[n])) > TOLERANCE} == {}


def test_four_steps_of_the_fine_tuning_recipe():
    meta, want = load_case("vggt", "train_steps")
    model = tiny_vggt(**CAMERA_DEPTH).train()
    model.aggregator.requires_grad_(False).eval()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trainable) == meta["trainable"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = create_optimizer("adamw", [{"params": list(trainable.values())}], lr=1e-3, weight_decay=0.05)
    objectives, norms, lrs = [], [], []
    for step in range(4):
        seed, targets = f"ts-vis-{step}", recorded_targets(f"ts-vis-{step}", 4, 2, 42, 56, is_scene=True)
        images = image(f"{seed}-img", 4, 2, 3, 42, 56)
        for rows in (slice(0, 2), slice(2, 4)):
            part = MultiViewTargets(*(x if x is None else x[rows] for x in targets))
            loss = multiview_loss(model(images[rows]), part)["loss"]
            (loss / 2).backward()
            objectives.append(loss.detach())
        lrs.append(linear_warmup_cosine(step / 4, lr=1e-3))
        optimizer.param_groups[0]["lr"] = lrs[-1]
        clipped = clip_by_module(model.named_parameters(), {"aggregator": 1.0, "depth": 1.0, "camera": 1.0})
        norms += [clipped["depth"], clipped["camera"]]
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, before[name]) for name, p in model.aggregator.named_parameters(prefix="aggregator"))
    with torch.no_grad():
        final = model.eval()(image("ts-vis-eval-img", 1, 2, 3, 42, 56))
        changes = torch.stack([(p - before[name]).norm() for name, p in trainable.items()])
    assert relative_error(torch.stack(objectives[:2]), want["objectives"][:2]) < TOLERANCE
    assert relative_error(torch.stack(norms[:2]), want["grad_norms"][:2]) < TOLERANCE
    assert relative_error(1e6 * torch.tensor(lrs), want["lrs"]) < TOLERANCE
    got = {"objectives": torch.stack(objectives), "grad_norms": torch.stack(norms), "delta_norms": changes}
    got |= {"final_pose": final["pose_enc"], "final_depth": final["depth"]}
    assert {n: e for n in got if (e := relative_error(got[n], want[n])) > STEPS} == {}
