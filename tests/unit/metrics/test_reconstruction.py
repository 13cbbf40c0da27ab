"""Point cloud metrics: recorded numbers, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from multiview_cases import cut3r_views, random_similarity
from parity_tools import load_case, normal, relative_error
from restrike import geometry as g
from restrike.metrics.reconstruction import (
    Chamfer,
    ReconstructionErrors,
    align_by_medians,
    chamfer_distance,
    cloud_errors,
)

seeds = st.integers(0, 10**6)


def cloud(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chamfer_inputs() -> tuple[dict, Tensor, Tensor, Tensor]:
    _, want = load_case("diffusionsfm", "chamfer")
    true = normal("dsfm.ch.gt", 2, 576, 3) + torch.tensor([0, 0, 3.0])
    turned = 0.5 * (true @ torch.from_numpy(want["in_rot"]).reshape(3, 3))
    predicted = turned + torch.tensor([0.3, 0.1, -0.2]) + 0.1 * normal("dsfm.ch.n", 2, 576, 3)
    return want, predicted, true, (normal("dsfm.ch.m", 2, 24, 24) > -0.7).reshape(2, 576)


def test_diffusionsfms_recorded_chamfer_distance_matches() -> None:
    want, predicted, true, mask = chamfer_inputs()
    got = chamfer_distance(predicted, true, mask)
    assert relative_error(got.chamfer, want["cd"]) < 1e-6
    assert relative_error(got.mean_distance, want["mean_dist"]) < 1e-6
    aligned = g.umeyama(predicted[mask], true[mask]).apply(predicted[mask])
    assert relative_error(aligned, want["pred_aligned"]) < 1e-5


def test_cut3rs_recorded_median_alignment_and_cloud_errors_match() -> None:
    meta, want = load_case("cut3r", "eval_mvrecon")
    views = {name: value[0] for name, value in cut3r_views(meta).items()}
    fit = align_by_medians(views["pred_cross"], views["cross"], views["valid"])
    names = ("aligned_pred", "centred_gt", "pred_shift_z", "gt_shift_z", "pred_scale", "gt_scale")
    for name, value in zip(names, fit, strict=True):
        assert relative_error(value, want[name]) < 1e-6, name
    predicted, true = fit.predicted[views["valid"]], fit.true[views["valid"]]
    normals, others = (F.normalize(normal(f"{meta['tag']}/{n}", len(true), 3), dim=-1) for n in ("np", "ng"))
    accuracy = cloud_errors(predicted, true, normals, others)
    completeness = cloud_errors(true, predicted, others, normals)
    assert relative_error(torch.stack(accuracy), want["accuracy"]) < 1e-6
    assert relative_error(torch.stack(completeness), want["completion"]) < 1e-6
    metric = ReconstructionErrors()
    metric.update(predicted, true, normals, others)
    result = metric.compute()
    assert result["overall"].item() == pytest.approx((want["accuracy"][0] + want["completion"][0]) / 2, rel=1e-6)
    both = (want["accuracy"][2] + want["completion"][2]) / 2
    assert result["normal_consistency"].item() == pytest.approx(both, rel=1e-6)


def test_cut3rs_recorded_registration_and_estimated_normals_match() -> None:
    meta, want = load_case("cut3r", "eval_icp")
    n = meta["n"]
    x, y = normal("cut3r/icp/u", n, 2).double().unbind(-1)
    true = torch.stack([x, y, 0.4 * torch.sin(2 * x) + 0.3 * torch.cos(1.5 * y)], dim=-1)
    turn = g.axis_angle_to_matrix(torch.tensor([0.03, -0.02, 0.04], dtype=torch.float64))
    shift = torch.tensor([0.03, -0.02, 0.02], dtype=torch.float64)
    predicted = g.rotate(turn, true + 0.005 * normal("cut3r/icp/n", n, 3).double()) + shift
    fit = g.register_icp(predicted, true, radius=0.1)
    assert relative_error(g.homogeneous(fit.transform), want["transformation"]) < 1e-6
    assert relative_error(torch.stack([fit.fitness, fit.inlier_rmse]), want["fitness_rmse"]) < 1e-6
    moved = g.transform_points(fit.transform, predicted)
    assert relative_error(torch.stack(cloud_errors(moved, true)), want["accuracy"]) < 1e-6
    assert relative_error(torch.stack(cloud_errors(true, moved)), want["completion"]) < 1e-6


@given(seeds)
def test_chamfer_ignores_world_and_unit_of_either_cloud(seed: int) -> None:
    true = cloud(seed, 50)
    predicted = true + 0.1 * cloud(seed + 1, 50)
    move, other = (g.Similarity(*(x[0] for x in random_similarity(s, 1))) for s in (seed, seed + 1))
    want = chamfer_distance(predicted, true)
    for got, expected in zip(chamfer_distance(move.apply(predicted), true), want, strict=True):
        torch.testing.assert_close(got, expected)
    both = chamfer_distance(other.apply(predicted), other.apply(true))
    for got, expected in zip(both, want, strict=True):
        torch.testing.assert_close(got, expected)


def test_chamfer_of_the_same_cloud_is_zero_and_masked_points_may_be_anything() -> None:
    _, predicted, true, mask = chamfer_inputs()
    assert chamfer_distance(true, true).chamfer == pytest.approx(0, abs=1e-12)
    want = chamfer_distance(predicted, true, mask)
    predicted[~mask], true[~mask] = torch.nan, torch.inf
    assert chamfer_distance(predicted, true, mask) == want
    with pytest.raises(ValueError, match="3 valid points or more, got 0"):
        chamfer_distance(predicted, true, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="one shape"):
        chamfer_distance(predicted[:1], true)


def test_chamfer_takes_the_median_of_sequences_then_of_categories_then_the_mean_of_orders() -> None:
    true = cloud(0, 40)
    noises = torch.tensor([0.05, 0.1, 0.4, 0.2, 0.3])
    groups = ["apple", "apple", "apple", "bench", "car"]
    metric = Chamfer(groups=["apple", "bench", "car", "donut"])
    scenes = torch.stack([true + noise * cloud(1, 40) for noise in noises])
    values = [chamfer_distance(scene, true).chamfer for scene in scenes]
    mask = torch.ones(5, 40, dtype=torch.bool)
    metric.update(scenes, true.expand(5, 40, 3), mask, groups, order=0)
    # Order 1: one category; a padding row that would change everything.
    padding = torch.tensor([False, False, True, False, False])
    metric.update(scenes, true.expand(5, 40, 3), mask, groups, order=1, valid=padding)
    categories = torch.stack([values[1], values[3], values[4]])  # apple's median is its second
    want = (categories.median() + values[2]) / 2
    torch.testing.assert_close(metric.compute()["chamfer"], want)


def test_accuracy_and_completeness_tell_missing_from_invented_surface() -> None:
    surface = cloud(0, 300)
    half = surface[surface[:, 0] > 0]
    accuracy, completeness = cloud_errors(half, surface), cloud_errors(surface, half)
    assert accuracy.mean == 0
    assert completeness.mean > 0.1
    metric = ReconstructionErrors()
    metric.update(half, surface)
    metric.update(surface, surface)
    result = metric.compute()
    torch.testing.assert_close(result["completeness"], completeness.mean / 2)
    assert result["accuracy"] == 0


@given(seeds)
def test_median_alignment_ignores_unit_and_depth_offset_of_the_prediction(seed: int) -> None:
    predicted, true = cloud(seed, 3, 5, 5), cloud(seed + 1, 3, 5, 5)
    valid = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(seed)) > 0.3
    want = align_by_medians(predicted, true, valid)
    offset = torch.tensor([0, 0, 4.0], dtype=torch.float64)
    got = align_by_medians(2.5 * predicted + offset, true, valid)
    torch.testing.assert_close(got.predicted, want.predicted)
    torch.testing.assert_close(got.true[valid][:, 2].median(), torch.zeros((), dtype=torch.float64))


def test_nothing_seen_is_nan() -> None:
    for metric, name in ((Chamfer(), "chamfer"), (ReconstructionErrors(), "accuracy")):
        with pytest.warns(UserWarning, match="before the ``update``"):
            assert metric.compute()[name].isnan()
