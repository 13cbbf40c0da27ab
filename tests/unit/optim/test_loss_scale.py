"""A loss scale that is followed, not applied: what clipping enlarged gradients does to true ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from restrike.optim.loss_scale import LossScale


def parameters(*gradients: list[float]) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(len(values))) for values in gradients]
    for parameter, values in zip(made, gradients, strict=True):
        parameter.grad = torch.tensor(values)
    return made


def gradients(made: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([p.grad for p in made if p.grad is not None])


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5, 1e-7])
def test_clipping_equals_that_of_gradients_that_were_scaled_clipped_and_unscaled(size):
    scale, values = 65536.0, ([3 * size, -4 * size], [12 * size])
    ours, theirs = parameters(*values), parameters(*values)
    norm = LossScale(scale).clip(ours, 1.0)
    for parameter in theirs:
        parameter.grad *= scale
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert norm is not None and float(norm) == pytest.approx(13 * size, rel=1e-6)
    torch.testing.assert_close(gradients(ours), gradients(theirs) / scale, rtol=1e-5, atol=0)


def test_the_scale_grows_after_good_steps_and_halves_without_gradients():
    scale = LossScale(8.0, growth_interval=3)
    seen = []
    for is_good in (True, True, True, True, False, True, True, True):
        made = parameters([1.0]) if is_good else [nn.Parameter(torch.zeros(1))]
        assert (scale.clip(made, 1.0) is None) != is_good
        seen.append(scale.scale)
    assert seen == [8, 8, 16, 16, 8, 8, 8, 16]


def test_the_state_goes_on_and_a_restart_begins_anew():
    scale = LossScale(8.0, growth_interval=3)
    for _ in range(4):
        scale.clip(parameters([1.0]), 1.0)
    other = LossScale(8.0, growth_interval=3)
    other.load_state_dict(scale.state_dict())
    assert (other.scale, other.good_steps) == (16.0, 1)
    other.restart()
    assert (other.scale, other.good_steps) == (8.0, 0)
