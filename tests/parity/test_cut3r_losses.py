"""CUT3R's criteria and their gradients against numbers recorded from the released code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cut3r_cases import recorded_predictions, recorded_targets
from parity_tools import load_case, relative_error
from restrike.losses.recurrent import recurrent_errors, recurrent_loss
from restrike.models.cut3r import Predictions

TIGHT = 1e-5
GRADIENTS = 1e-4
OUTPUTS = {
    "pts3d_in_self_view": "points_camera",
    "conf_self": "confidence_camera",
    "pts3d_in_other_view": "points_world",
    "conf": "confidence_world",
    "rgb": "colors",
    "camera_pose": "poses",
}


def by_view(**terms: Tensor) -> dict[str, Tensor]:
    return {f"{name}_view{i}": x for name, values in terms.items() for i, x in enumerate(values, 1)}


def wrong(got: dict[str, Tensor], want: dict[str, Any], tolerance: float) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {name: e for name in want if not (e := relative_error(got[name], want[name])) <= tolerance}


@pytest.mark.parametrize(
    "case, anchor", [("loss_train_static", None), ("loss_train_anchor", 2), ("loss_train_batchlist", None)]
)
def test_training_losses_and_their_gradients(case, anchor):
    meta, want = load_case("cut3r", case)
    predictions, targets = recorded_predictions(meta), recorded_targets(meta, anchor)
    parts = recurrent_loss(predictions, targets, is_mixed="BatchList" in meta["criterion"], released_pose_mask=True)
    gradients = torch.autograd.grad(parts["loss"], predictions)
    got = {"total": parts["loss"], "pose_loss": parts["loss_pose"]} | by_view(
        dist_self=parts["distance_camera"],
        dist_cross=parts["distance_world"],
        confloss_self=parts["loss_camera"],
        confloss_cross=parts["loss_world"],
        rgb=parts["loss_color"],
    )
    assert wrong(got, {n: x for n, x in want.items() if not n.startswith("grad/")}, TIGHT) == {}
    of_views = {
        f"grad/view{i}.{name}": gradient[:, i]
        for name, gradient in zip(OUTPUTS, Predictions(*gradients)._asdict().values(), strict=True)
        for i in (0, meta["V"] - 1)
    }
    assert wrong(of_views, {n: x for n, x in want.items() if n.startswith("grad/")}, GRADIENTS) == {}


@torch.no_grad()
def test_the_test_criterion():
    meta, want = load_case("cut3r", "loss_test")
    parts = recurrent_errors(recorded_predictions(meta), recorded_targets(meta))
    got = {"total": parts["loss"], "pose_loss": parts["loss_pose"]} | by_view(
        dist_self=parts["distance_camera"],
        dist_cross=parts["distance_world"],
        scaleinv_dist_self=parts["scale_invariant_camera"],
        scaleinv_dist_cross=parts["scale_invariant_world"],
        rgb=parts["loss_color"],
    )
    assert wrong(got, want, TIGHT) == {}
