"""Schedules against torch's and timm's schedulers, and through LambdaLR."""

from __future__ import annotations

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import OneCycleLR

from restrike.optim import (
    cosine,
    lr_scheduler,
    make_schedule,
    one_cycle,
    scale_factor,
    warmup_cosine,
    weight_decay_at,
)
from restrike.optim.progress import linear_warmup_cosine, released_progress

LR, MIN, WARM = 0.4, 0.01, 0.02


def optimizer(lr: float = LR) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize("function, is_shifted", [(warmup_cosine, False), (cosine, True)])
def test_cosines_equal_timm(function, is_shifted):
    sgd = optimizer()
    length = 50 - 8 if is_shifted else 50
    timm = CosineLRScheduler(
        sgd, length, lr_min=MIN, warmup_t=8, warmup_lr_init=WARM, warmup_prefix=is_shifted, t_in_epochs=False
    )
    for step in range(1, 60):
        timm.step_update(step)
        ours = function(step, lr=LR, total_steps=50, warmup_steps=8, warmup_lr=WARM, min_lr=MIN)
        assert ours == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9), step


def test_only_the_unshifted_cosine_jumps_when_the_warm_up_ends():
    lengths = {"lr": LR, "total_steps": 50, "warmup_steps": 10, "min_lr": MIN}
    assert cosine(10, **lengths) == LR
    assert warmup_cosine(10, **lengths) < 0.95 * LR


def test_one_cycle_equals_torch():
    sgd = optimizer()
    torch_schedule = OneCycleLR(
        sgd, LR, total_steps=40, pct_start=0.25, div_factor=20, final_div_factor=2, cycle_momentum=False
    )
    for step in range(1, 41):
        ours = one_cycle(step, lr=LR, total_steps=40, warmup_steps=10, warmup_lr=LR / 20, min_lr=LR / 40)
        assert ours == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9), step
        sgd.step()
        if step < 40:
            torch_schedule.step()


@pytest.mark.parametrize("name", ["warmup_cosine", "cosine", "constant", "one_cycle"])
def test_each_step_uses_its_own_rate_and_groups_keep_their_ratio(name):
    schedule = make_schedule(name, lr=LR, total_steps=20, warmup_steps=4, warmup_lr=WARM, min_lr=MIN)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    sgd = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 10 * LR}], lr=LR)
    scheduler = lr_scheduler(sgd, schedule, LR)
    for step in range(1, 25):
        body, head = (group["lr"] for group in sgd.param_groups)
        assert body == pytest.approx(schedule(step)) and head == pytest.approx(10 * schedule(step))
        sgd.step()
        scheduler.step()


def test_scheduler_state_resumes():
    schedule = make_schedule("cosine", lr=LR, total_steps=20, min_lr=MIN)
    first, second = (lr_scheduler(optimizer(), schedule, LR) for _ in range(2))
    for _ in range(7):
        first.optimizer.step()
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr() == first.get_last_lr() and second.last_epoch == 7


def test_bad_schedules_are_named():
    with pytest.raises(ValueError, match="one of warmup_cosine, cosine, .*, released_progress_cosine, got 'cosin'"):
        make_schedule("cosin", lr=LR, total_steps=20)
    with pytest.raises(ValueError, match="20 of 20 steps; lower warmup_epochs"):
        make_schedule("cosine", lr=LR, total_steps=20, warmup_steps=20)


@pytest.mark.parametrize(
    "rule, effective, reference, factor",
    [("none", 4096, 256, 1.0), ("linear", 512, 256, 2.0), ("sqrt", 128, 16, 8**0.5), ("sqrt", 8, 16, 0.5**0.5)],
)
def test_scale_factor(rule, effective, reference, factor):
    assert scale_factor(rule, effective, reference) == pytest.approx(factor)


def test_bad_scaling_is_named():
    with pytest.raises(ValueError, match="none, linear, sqrt, got 'root'"):
        scale_factor("root", 1, 1)
    with pytest.raises(ValueError, match="at least 1"):
        scale_factor("sqrt", 0, 16)


def test_schedules_by_progress():
    shape = {"lr": LR, "warmup_lr": 1e-8, "min_lr": 1e-8}
    ours = make_schedule("progress_cosine", total_steps=40, warmup_steps=2, **shape)
    assert [ours(step) for step in range(1, 41)] == [
        linear_warmup_cosine((step - 1) / 40, warmup=0.05, **shape) for step in range(1, 41)
    ]
    # 20 epochs of 801 steps which count as 800; the last step of the run keeps the rate before it.
    released = make_schedule(
        "released_progress_cosine", total_steps=16_020, warmup_steps=801, steps_per_epoch=801, **shape
    )
    for step in (1, 2, 801, 802, 9000, 16_019, 16_020):
        assert released(step) == linear_warmup_cosine(released_progress(step), warmup=0.05, **shape)
    assert released(16_020) == released(16_019)
    with pytest.raises(ValueError, match="give its lengths in epochs"):
        make_schedule("released_progress_cosine", total_steps=100, **shape)


def test_weight_decay_follows_a_cosine():
    values = [weight_decay_at(step, 0.04, 0.4, 5) for step in range(1, 7)]
    assert values == pytest.approx([0.04, values[1], 0.22, values[3], 0.4, 0.4])
    assert values == sorted(values)
