import pytest
import torch
from torch import nn

from restrike.optim.module_clipping import clip_by_module
from restrike.optim.progress import linear_warmup_cosine, progress, released_progress


def test_progress_starts_at_zero_and_ends_at_one():
    assert [progress(step, 4) for step in (1, 2, 5, 9)] == [0, 0.25, 1, 1]


def test_the_release_counts_one_iteration_too_many_and_skips_the_last_progress():
    steps = 20 * 801
    assert released_progress(1) == 0
    assert released_progress(801) == released_progress(802) == 1 / 20
    assert released_progress(steps - 1) == released_progress(steps) == pytest.approx((19 + 799 / 800) / 20)
    rates = [linear_warmup_cosine(released_progress(step), lr=5e-5) for step in range(1, steps + 1)]
    assert rates[0] == 1e-8
    assert max(rates) == pytest.approx(5e-5)
    assert 1e-8 < rates[-1] < 1.1e-8


def parts_with_gradients() -> nn.ModuleDict:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("aggregator_camera", "camera_head", "depth_head")})
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + i)
    return model


def test_each_part_is_clipped_once_to_its_own_norm():
    model = parts_with_gradients()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    norms = clip_by_module(model.named_parameters(), {"aggregator": 1e9, "camera": 1.0, "depth": 2.0})
    assert list(norms) == ["aggregator", "camera", "depth"]
    assert norms["camera"] == pytest.approx((4 * 9 + 2 * 16) ** 0.5)
    after = {name: torch.nn.utils.get_total_norm([p.grad for p in part.parameters()]) for name, part in model.items()}
    assert after["camera_head"] == pytest.approx(1.0, rel=1e-5)
    assert after["depth_head"] == pytest.approx(2.0, rel=1e-5)
    assert torch.equal(model["aggregator_camera"].weight.grad, before["aggregator_camera.weight"])


def test_a_trained_part_without_a_limit_is_named_and_a_frozen_one_is_not():
    model = parts_with_gradients()
    with pytest.raises(ValueError, match=r"'depth_head.weight' has a gradient but no limit .*add one for 'depth_head'"):
        clip_by_module(model.named_parameters(), {"aggregator": 1.0, "camera": 1.0})
    model["depth_head"].zero_grad()
    assert list(clip_by_module(model.named_parameters(), {"aggregator": 1.0, "camera": 1.0})) == [
        "aggregator",
        "camera",
    ]
