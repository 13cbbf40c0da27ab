"""Properties of the multi-view losses that recorded numbers do not show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parity_tools import normal
from restrike.losses import (
    LossWeights,
    camera_loss,
    dense_loss,
    gradient_loss,
    masked_mean,
    multiview_loss,
    normal_loss,
    quantile_filter,
    surface_normals,
    track_loss,
)
from tiny_vggt import recorded_targets

SHAPE = (1, 2, 12, 14)
ALL = torch.ones(SHAPE, dtype=torch.bool)


def maps(channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, confidence and target."""
    confidence = 1 + normal("loss-c", *SHAPE).exp()
    return (
        normal("loss-p", *SHAPE, channels).requires_grad_(),
        confidence.requires_grad_(),
        normal("t", *SHAPE, channels),
    )


# Dense


@pytest.mark.parametrize("surface", ["", "grad", "normal", "normal_conf"])
def test_nothing_at_an_invalid_pixel_reaches_loss_or_gradient(surface):
    prediction, confidence, target = maps(3)
    valid = normal("loss-v", *SHAPE) > -0.8
    want = dense_loss(prediction, confidence, target, valid, surface)
    spoilt = torch.where(valid[..., None], prediction, torch.nan).detach().requires_grad_()
    distrusted = torch.where(valid, confidence, 0.0).detach().requires_grad_()
    got = dense_loss(spoilt, distrusted, torch.where(valid[..., None], target, torch.nan), valid, surface)
    if surface.endswith("_conf"):
        got = got._replace(gradient=want.gradient)
    assert torch.allclose(torch.stack(got), torch.stack(want))
    got.total.backward()
    assert spoilt.grad.isfinite().all()
    assert not spoilt.grad[~valid].any()


def test_a_perfect_map_costs_only_its_lack_of_confidence():
    _, confidence, target = maps()
    loss = dense_loss(target.clone().requires_grad_(), confidence, target, ALL)
    assert not torch.stack([loss.regression, loss.gradient]).any()
    assert torch.allclose(loss.confidence, -0.2 * confidence.log().mean())


def test_fewer_than_a_hundred_valid_pixels_cost_nothing_but_keep_a_graph():
    prediction, confidence, target = maps()
    valid = torch.zeros_like(ALL)
    valid[0, 0, :9, :11] = True
    loss = dense_loss(prediction, confidence, target, valid)
    assert not loss.total.detach()
    loss.total.backward()
    assert not prediction.grad.any()
    assert not confidence.grad.any()
    valid[0, 1, 0, 0] = True
    assert dense_loss(prediction, confidence, target, valid).regression.detach() > 0


def test_losses_are_computed_in_float32_under_autocast():
    prediction, confidence, target = maps()
    want = dense_loss(prediction, confidence, target, ALL)
    with torch.autocast("cpu", torch.bfloat16):
        got = dense_loss(prediction, confidence, target, ALL)
    assert got == want


def test_an_offset_has_no_gradient_and_a_ramp_has_its_slope():
    target, valid = normal("t", 1, 8, 10, 2), torch.ones(1, 8, 10, dtype=torch.bool)
    assert float(gradient_loss(target + 3, target, valid)) < 1e-5
    ramp = 0.5 * torch.arange(10.0).view(1, 1, 10, 1)
    # 8 · 9 pairs of neighbours over 8 · 10 pixels, in each channel
    assert float(gradient_loss(target + ramp, target, valid)) == pytest.approx(0.5 * 9 / 10, rel=1e-4)


def test_normals_of_a_slanted_plane():
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    plane = torch.stack([x, y, 2 + x], dim=-1)[None]
    valid = torch.ones(1, 6, 7, dtype=torch.bool)
    normals, exists = surface_normals(plane, valid)
    expected = torch.tensor([-1.0, 0.0, 1.0]) / 2**0.5
    found = normals[exists]
    assert torch.allclose(found.abs(), expected.abs().expand_as(found), atol=1e-6)
    assert int(exists.sum()) == 4 * 5 * 6  # each of the four corners of a pixel needs two neighbours
    assert float(normal_loss(plane, plane, valid)) == pytest.approx(0, abs=1e-6)
    flat = torch.stack([x, y, torch.full_like(x, 2)], dim=-1)[None]
    assert float(normal_loss(flat, plane, valid)) == pytest.approx(1 - 0.5**0.5, rel=1e-5)


def test_outliers_are_dropped_where_many_pixels_remain():
    x = normal("outliers", 4000).abs()
    x[:40] = 1e6
    mask = torch.ones(4000, dtype=torch.bool)
    values, keep = quantile_filter(x, mask, 0.98)
    assert not keep[:40].any()
    assert int(keep.sum()) == 3919  # below the nearest-rank quantile of 4000
    assert float(masked_mean(values, keep)) < 1
    assert quantile_filter(x, mask, 1.0)[1].all()


def test_an_unknown_kind_of_loss_is_refused():
    with pytest.raises(ValueError, match="surface: expected one of"):
        dense_loss(*maps(), ALL, surface="gradient")
    with pytest.raises(ValueError, match="distance: expected one of"):
        camera_loss([torch.zeros(1, 2, 9)], torch.zeros(1, 2, 9), ALL, distance="l3")


# Cameras


def test_later_rounds_of_the_camera_head_weigh_more():
    target, off = torch.zeros(1, 2, 9), torch.full((1, 2, 9), 0.5)
    early, late = (float(camera_loss(rounds, target, ALL).total) for rounds in ([off, target], [target, off]))
    assert late == pytest.approx(0.5 * (0.5 + 0.5 + 0.25))
    assert early == pytest.approx(0.6 * late)


def test_a_scene_counts_if_its_first_view_has_more_than_a_hundred_valid_pixels():
    encoding = normal("enc", 2, 2, 9).requires_grad_()
    valid = torch.ones(2, 2, 12, 14, dtype=torch.bool)
    valid[0, 0] = False
    valid[0, 0].view(-1)[:100] = True
    valid[1, 1] = False
    both = camera_loss([encoding], torch.zeros(2, 2, 9), valid)
    alone = camera_loss([encoding[1:]], torch.zeros(1, 2, 9), valid[1:])
    assert both == alone
    both.total.backward()
    assert not encoding.grad[0].any()
    assert encoding.grad[1].all()


def test_huber_is_quadratic_near_and_linear_far():
    target = torch.zeros(1, 2, 9)
    near, far = (
        float(camera_loss([torch.full((1, 2, 9), d)], target, ALL, "huber", huber_delta=0.1).translation)
        for d in (0.05, 2.0)
    )
    assert near == pytest.approx(0.5 * 0.05**2)
    assert far == pytest.approx(0.1 * (2.0 - 0.05))


# Tracks


def test_tracks_count_where_they_are_visible_and_start_visible():
    target = torch.zeros(1, 2, 3, 2)
    coords = torch.zeros(1, 2, 3, 2)
    coords[0, 1, :, 0] = torch.tensor([2.0, 8.0, 50.0])
    visible = torch.tensor([[[True, True, False], [True, False, True]]])
    logits = torch.zeros(1, 2, 3)
    loss = track_loss([coords], logits, logits, target, visible)
    assert float(loss.coords) == pytest.approx(2 / 2 / 3)  # (0, 0, |2|) over two axes and three visible places
    assert float(loss.visibility) == float(loss.confidence) == pytest.approx(torch.tensor(2.0).log().item())
    sure = torch.tensor([[[9.0, 9, 0], [9, -9, 0]]])
    assert float(track_loss([coords], sure, sure, target, visible).visibility) < 1e-3
    assert float(track_loss([coords], sure, sure, target, visible).confidence) < 1e-3
    assert float(track_loss([coords, target], sure, sure, target, visible).coords) == pytest.approx(0.8 / 2 / 3)


# The objective


def objective(weights: LossWeights, **predictions: Tensor) -> dict[str, Tensor]:
    return multiview_loss(predictions, recorded_targets("objective", 1, 2, 12, 14, is_scene=True), weights)


def test_parts_are_unweighted_and_add_up():
    encodings = [normal("enc", 1, 2, 9)]
    prediction, confidence, _ = maps()
    losses = objective(LossWeights(2.0, 3.0), pose_enc_list=encodings, depth=prediction, depth_conf=confidence)
    assert torch.allclose(losses["loss"], 2 * losses["loss_camera"] + 3 * losses["loss_depth"])
    parts = [losses[f"loss_depth_{name}"] for name in ("confidence", "regression", "gradient")]
    assert torch.allclose(losses["loss_depth"], sum(parts))
    assert "loss_point" not in losses


def test_a_weight_without_its_head_or_its_targets_is_refused():
    with pytest.raises(ValueError, match="depth head has weight 1.0, .* build it with enable_depth=True"):
        objective(LossWeights(), pose_enc_list=[normal("enc", 1, 2, 9)])
    with pytest.raises(ValueError, match="needs targets with tracks"):
        objective(LossWeights(0, 0, 0, 0.05), track_list=[torch.zeros(1, 2, 3, 2)])
    with pytest.raises(ValueError, match="all weights of the loss are 0"):
        objective(LossWeights(0, 0))
