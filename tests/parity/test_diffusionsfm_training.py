"""DiffusionSfM's optimiser steps against traces recorded from the released trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusionsfm_cases import ndc, recorded_model, unit_rays
from parity_tools import fill_, imagenet_image, load_case, normal, relative_error
from restrike.losses import ray_loss
from restrike.models.diffusionsfm import ImageFeatures, dense_from_sparse
from restrike.optim import create_optimizer, param_groups
from restrike.optim.loss_scale import LossScale

ADAM: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}
SCALE = 65536.0


def step_loss(model: nn.Module, features: ImageFeatures, seed: str, k: int, coords: Tensor, times: Tensor) -> Tensor:
    """Loss of the k-th recorded batch."""
    shape = len(times), coords.shape[1], model.map_size, model.map_size
    clean = unit_rays(f"{seed}.x0{k}", *shape)
    mask = (normal(f"{seed}.mask{k}", *shape) > (-0.8 if seed == "dsfm.ts" else -1.0)).float()
    noise = normal(f"{seed}.eps{k}", *shape[:2], 8, *shape[2:])
    noisy = model.noise_scheduler.add_noise(clean, noise, times) * mask[:, :, None]
    return ray_loss(model.denoise(features, noisy, coords, times, mask), clean, mask)


def gradient_norm(model: nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def changes(model: nn.Module, before: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {key: parameters[name].detach() - before[name] for key, name in names.items()}


def test_five_steps_of_the_sparse_stage():
    meta, want = load_case("diffusionsfm", "train_steps_sparse")
    model = recorded_model(meta).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = create_optimizer("adam", param_groups(model, 0.0), **ADAM)
    losses, norms = [], []
    coords = ndc(meta["inputs"]["crop"], 4).expand(2, -1, -1, -1, -1)
    for k in range(meta["inputs"]["steps"]):
        features = ImageFeatures(normal(f"dsfm.ts.feat{k}", 2, 3, 384, 4, 4))
        times = torch.tensor([(17 * k + 29 * b + 5) % 100 for b in range(2)])
        loss = step_loss(model, features, "dsfm.ts", k, coords, times)
        optimizer.zero_grad()
        loss.backward()
        norms.append(SCALE * gradient_norm(model))
        optimizer.step()
        losses.append(loss.detach())
    assert relative_error(torch.stack(losses), want["losses"]) < 1e-5
    assert relative_error(torch.stack(norms), want["scaled_norm"]) < 1e-3
    got = changes(model, before, {
        "delta_input_conv": "scratch.input_conv.weight",
        "delta_qkv": "ray_predictor.blocks.0.attn.qkv.weight",
        "delta_final": "ray_predictor.final_layer.linear.weight",
        "delta_t_embedder": "ray_predictor.t_embedder.mlp.2.weight",
    })  # fmt: skip
    assert {name: e for name, x in got.items() if (e := relative_error(x, want[name])) > 2e-3} == {}


NAMES = {
    "out": "scratch.output_conv.4.weight",
    "rn3": "scratch.layer3_rn.weight",
    "proj": "project_opers.0.project.0.weight",
    "conv": "scratch.input_conv.weight",
    "adaln": "scratch.refinenet1.resConfUnit2.adaLN_modulation.1.weight",
}
LATE = {"dit": "ray_predictor.blocks.5.attn.qkv.weight", "dino": "feature_extractor.model.blocks.3.mlp.fc1.weight"}


def converted(meta: dict[str, Any]) -> nn.Module:
    """The dense model with its ray embedding from a sparse one."""
    model, sparse = recorded_model(meta), nn.Module()
    sparse.scratch = nn.Module()
    sparse.scratch.input_conv = nn.Linear(9, 384)
    start = dense_from_sparse(fill_(sparse).state_dict())
    assert model.load_state_dict(start, strict=False).unexpected_keys == []
    return model.train()


@pytest.mark.slow
def test_steps_of_the_dense_stage_before_and_after_everything_trains():
    meta, want = load_case("diffusionsfm", "train_steps_dense")
    model, options = converted(meta), meta["inputs"]
    assert relative_error(dict(model.named_parameters())[NAMES["conv"]], want["conv_init"]) < 1e-6
    frozen = [*model.feature_extractor.parameters(), *model.ray_predictor.parameters()]
    trained = [p for p in frozen if p.requires_grad]
    factors = {"feature_extractor.*": 0.1, "ray_predictor.*": 0.1}
    coords = ndc(options["crop"], 16)
    recorded: dict[str, list[Tensor]] = {
        name: [] for name in ("losses", "scaled_norm", "clipped_norm", "unscaled_norm")
    }
    k = 0
    for phase, steps in (("frozen", options["frozen_steps"]), ("full", options["full_steps"])):
        for parameter in trained:
            parameter.requires_grad_(phase == "full")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        groups = param_groups(model, 0.0, factors if phase == "full" else None)
        optimizer, scale = create_optimizer("adam", groups, **ADAM), LossScale(SCALE)
        for _ in range(steps):
            features = model.encode(imagenet_image(f"dsfm.td.img{k}", 1, 2, 3, 224, 224))
            loss = step_loss(model, features, "dsfm.td", k, coords, torch.tensor([(31 * k + 11) % 100]))
            optimizer.zero_grad()
            loss.backward()
            norm = scale.clip(model.parameters(), 1.0)
            assert norm is not None
            recorded["losses"].append(loss.detach())
            recorded["scaled_norm"].append(SCALE * norm)
            recorded["unscaled_norm"].append(gradient_norm(model))
            recorded["clipped_norm"].append(SCALE * recorded["unscaled_norm"][-1])
            optimizer.step()
            k += 1
        names = NAMES if phase == "frozen" else NAMES | LATE
        for name, change in changes(model, before, names).items():
            error = relative_error(change, want[f"delta_{phase}_{name}"])
            assert error < (3e-2 if name in LATE else 5e-3), (phase, name, error)
    assert relative_error(torch.stack(recorded["losses"]), want["losses"]) < 1e-4
    for name in ("scaled_norm", "clipped_norm", "unscaled_norm"):
        assert relative_error(torch.stack(recorded[name]), want[name]) < 1e-3, name
