"""Depth metrics: recorded numbers, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parity_tools import load_case, normal, relative_error
from restrike.metrics.depth import NAMES, DepthErrors, align_depth, depth_errors

# Recorded in float32: ten reweighted steps that divide by |residual| + 1e-8 are not settled, and rounding decides
# which pixel they chase. Everything else agrees to float32.
LOOSE = {"scale": 3e-4, "scale_nomax": 1e-5}
CASES = {
    "median": {"alignment": "median", "max_depth": 70},
    "median_clip": {"alignment": "median", "max_depth": 70, "clip": 70},
    "scale": {"alignment": "scale", "max_depth": 70},
    "scale_nomax": {"alignment": "scale"},
    "metric": {"alignment": "metric", "max_depth": 70},
    "scale_shift_adam": {"alignment": "scale_shift", "max_depth": 70},
    "lstsq": {"alignment": "least_squares", "max_depth": 70},
}


def recorded_depths() -> tuple[Tensor, Tensor]:
    shape = (3, 24, 32)
    true = 6 * torch.exp(0.6 * normal("cut3r/ed/g", *shape))
    true[normal("cut3r/ed/hole", *shape) < -1] = 0
    true[normal("cut3r/ed/far", *shape) > 2] = 90
    return 0.4 * true * torch.exp(0.15 * normal("cut3r/ed/e", *shape)) + 0.3, true


def random_depths(seed: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    true = 2 + 5 * torch.rand(batch, 2, 4, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(true.shape, generator=generator, dtype=torch.float64)
    holes = torch.linspace(0.1, 0.5, batch).view(batch, 1, 1, 1)
    true[torch.rand(true.shape, generator=generator) < holes] = 0
    return (true + 1) * (0.2 * noise).exp(), true


def result(alignment: str, *batches: tuple[Tensor, ...], **options: float) -> dict[str, Tensor]:
    metric = DepthErrors(alignment, **options)  # type: ignore[arg-type]
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


@pytest.mark.parametrize("name", CASES)
def test_recorded_errors_match_under_every_alignment(name: str) -> None:
    _, want = load_case("cut3r", "eval_depth")
    metric = DepthErrors(**CASES[name])
    predicted, true = recorded_depths()
    metric.update(predicted[None], true[None])
    assert metric.pixels == want[name][7]
    assert list(metric.compute()) == list(NAMES)
    assert relative_error(torch.stack(list(metric.compute().values())), want[name][:7]) < LOOSE.get(name, 1e-6)


@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_the_unit_of_the_prediction_does_not_matter_where_scale_is_aligned(seed: int, factor: float) -> None:
    predicted, true = random_depths(seed)
    for alignment in ("median", "scale", "least_squares"):
        torch.testing.assert_close(result(alignment, (predicted * factor, true)), result(alignment, (predicted, true)))
    shifted = result("least_squares", (predicted * factor + 3, true))
    torch.testing.assert_close(shifted, result("least_squares", (predicted, true)))
    assert result("metric", (predicted * 3, true))["abs_rel"] > result("metric", (predicted, true))["abs_rel"]


@pytest.mark.parametrize("alignment", ["metric", "median", "scale", "scale_shift", "least_squares"])
def test_perfect_depth_has_no_error(alignment: str) -> None:
    _, true = random_depths(0)
    got = result(alignment, (true.clamp(min=1e-3), true))
    for name, value in got.items():
        assert value == pytest.approx(1.0 if name.startswith("delta") else 0.0, abs=1e-9), name


@pytest.mark.parametrize("alignment", ["median", "scale", "scale_shift", "least_squares"])
def test_each_sequence_is_aligned_on_its_own_and_pixels_weigh_alike(alignment: str) -> None:
    predicted, true = random_depths(0)
    predicted = predicted * torch.tensor([1.0, 5, 0.1], dtype=torch.float64).view(3, 1, 1, 1)
    together = result(alignment, (predicted, true))
    one_by_one = result(alignment, *((predicted[i : i + 1], true[i : i + 1]) for i in range(3)))
    torch.testing.assert_close(together, one_by_one)
    counts = (true > 0).flatten(1).sum(1)
    assert len(set(counts.tolist())) > 1
    singles = [result(alignment, (predicted[i : i + 1], true[i : i + 1])) for i in range(3)]
    want = sum(c * s["abs_rel"] for c, s in zip(counts, singles, strict=True)) / counts.sum()
    torch.testing.assert_close(together["abs_rel"], want)


def test_unknown_infinite_and_far_depth_and_padding_rows_do_not_count() -> None:
    predicted, true = random_depths(0)
    want = result("median", (predicted[:2], true[:2]), max_depth=6.0)
    spoilt, padded = predicted.clone(), true.clone()
    unknown = (true <= 0) | (true >= 6)
    spoilt[unknown] = torch.nan
    padded[(true <= 0) & (torch.rand(true.shape) < 0.5)] = torch.inf
    valid = torch.tensor([True, True, False])
    spoilt[2] = torch.nan
    torch.testing.assert_close(result("median", (spoilt, padded, valid), max_depth=6.0), want)


def test_least_absolute_scale_is_near_the_best_one() -> None:
    predicted, true = (x.flatten(1) for x in random_depths(0))
    valid = true > 0
    scale = align_depth(predicted, true, valid, "scale").scale

    def loss(s: Tensor) -> Tensor:
        return torch.where(valid, (s[:, None] * predicted - true).abs(), 0.0).sum(1)

    steps = torch.linspace(0.8, 1.25, 200, dtype=torch.float64)
    best = torch.stack([loss(scale * step) for step in steps]).amin(0)
    assert (loss(scale) < 1.01 * best).all()  # ten steps are near it, not there
    mean_ratio = torch.where(valid, true, 0).sum(1) / torch.where(valid, predicted, 0).sum(1)
    assert (loss(scale) < loss(mean_ratio)).all()


def test_least_squares_equals_the_normal_equations() -> None:
    predicted, true = (x.flatten(1) for x in random_depths(0))
    valid = true > 0
    fit = align_depth(predicted, true, valid, "least_squares")
    for row in range(3):
        x = predicted[row][valid[row]]
        want = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], -1), true[row][valid[row]][:, None]).solution
        torch.testing.assert_close(torch.stack([fit.scale[row], fit.shift[row]]), want[:, 0])


def test_predictions_that_are_not_positive_never_count_as_close() -> None:
    true = torch.ones(1, 4, dtype=torch.float64)
    errors = depth_errors(torch.tensor([[1.0, -1.0, 0.0, torch.nan]]), true, torch.ones(1, 4, dtype=torch.bool))
    assert errors[0, NAMES.index("delta@1.25")] == 0.25


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_alignment_by_gradient_descent_works_inside_evaluation(mode) -> None:
    with mode():
        predicted, true = random_depths(0)
        got = result("scale_shift", (predicted, true))
    torch.testing.assert_close(got, result("scale_shift", random_depths(0)))


def test_nothing_to_evaluate_is_nan_and_mistakes_are_named() -> None:
    predicted, true = random_depths(0)
    assert result("scale", (predicted, torch.zeros_like(true)))["abs_rel"].isnan()
    with pytest.raises(ValueError, match="metric, median, scale, scale_shift, least_squares, got 'affine'"):
        DepthErrors("affine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[B, V, H, W\]"):
        DepthErrors("scale").update(predicted[0], true[0])
