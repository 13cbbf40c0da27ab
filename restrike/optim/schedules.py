"""Learning-rate schedules as pure functions of the optimiser step, counted from 1.

Step t is the t-th optimiser step of the run, and the value is the learning rate which that step uses. FasterViT's
cosine is not shifted by its warm-up: it runs over steps 0 … L from the start, so the rate jumps down when the warm-up
ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from restrike.optim.progress import linear_warmup_cosine, progress, released_progress

ScheduleName = Literal[
    "warmup_cosine", "cosine", "constant", "one_cycle", "progress_cosine", "released_progress_cosine"
]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
Schedule = Callable[[int], float]


def warmup_cosine(
    step: int, *, lr: float, total_steps: int, warmup_steps: int = 0, warmup_lr: float = 0.0, min_lr: float = 0.0
) -> float:
    """Linear warm-up, then a cosine over the whole length, then `min_lr` (FasterViT, arXiv 2306.06189).

    Args:
        step: Optimiser step, from 1.
        lr: Peak.
        total_steps: Length of the cosine, warm-up included; later steps (the cooldown) use `min_lr`.
        warmup_steps: The warm-up covers the steps below this one.
        warmup_lr: Where the warm-up starts, at step 0.
        min_lr: Where the cosine ends.
    """
    if step < warmup_steps:
        return warmup_lr + step * (lr - warmup_lr) / warmup_steps
    if step >= total_steps:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * step / total_steps))


def cosine(
    step: int, *, lr: float, total_steps: int, warmup_steps: int = 0, warmup_lr: float = 0.0, min_lr: float = 0.0
) -> float:
    """Like `warmup_cosine`, but the cosine starts where the warm-up ends, so that the rate has no jump."""
    if step < warmup_steps:
        return warmup_lr + step * (lr - warmup_lr) / warmup_steps
    if step >= total_steps:
        return min_lr
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


def constant(step: int, *, lr: float, warmup_steps: int = 0, warmup_lr: float = 0.0) -> float:
    """Linear warm-up, then `lr` for ever."""
    return warmup_lr + step * (lr - warmup_lr) / warmup_steps if step < warmup_steps else lr


def one_cycle(
    step: int, *, lr: float, total_steps: int, warmup_steps: int = 0, warmup_lr: float = 0.0, min_lr: float = 0.0
) -> float:
    """A half cosine up to `lr` at step `warmup_steps`, another down to `min_lr` at the last step (arXiv 1708.07120).

    Equal to `torch.optim.lr_scheduler.OneCycleLR` with its cosine annealing and without its momentum cycle: the first
    step uses `warmup_lr`, step `total_steps` uses `min_lr`.
    """
    if step >= total_steps:
        return min_lr
    if step < warmup_steps:
        start, end, progress = warmup_lr, lr, (step - 1) / (warmup_steps - 1)
    else:
        first = max(warmup_steps, 1)
        start, end, progress = lr, min_lr, (step - first) / (total_steps - first)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def make_schedule(
    name: ScheduleName,
    *,
    lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    steps_per_epoch: int | None = None,
) -> Schedule:
    """The schedule of that name as a function of the step alone.

    Args:
        steps_per_epoch: Needed by "released_progress_cosine" alone; the rest as in the functions above.

    Raises:
        ValueError: an unknown name, a warm-up that does not fit into the run, or no length of an epoch.
    """
    if name not in SCHEDULES:
        raise ValueError(f"expected the schedule to be one of {', '.join(SCHEDULES)}, got {name!r}")
    if name == "constant":
        return lambda step: constant(step, lr=lr, warmup_steps=warmup_steps, warmup_lr=warmup_lr)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"expected a warm-up shorter than the schedule, got {warmup_steps} of {total_steps} steps; "
            "lower warmup_epochs or raise schedule_epochs"
        )
    if name in ("progress_cosine", "released_progress_cosine"):
        where = _progress_of(name, total_steps, steps_per_epoch)
        shape = {"lr": lr, "warmup_lr": warmup_lr, "min_lr": min_lr, "warmup": warmup_steps / total_steps}
        return lambda step: linear_warmup_cosine(where(step), **shape)
    function = {"warmup_cosine": warmup_cosine, "cosine": cosine, "one_cycle": one_cycle}[name]
    return lambda step: function(
        step, lr=lr, total_steps=total_steps, warmup_steps=warmup_steps, warmup_lr=warmup_lr, min_lr=min_lr
    )


def _progress_of(name: str, total_steps: int, steps_per_epoch: int | None) -> Schedule:
    """Share of the run that is done at a step."""
    if name == "progress_cosine":
        return lambda step: progress(step, total_steps)
    if steps_per_epoch is None or steps_per_epoch < 3:
        raise ValueError(
            "released_progress_cosine counts epochs of one step more than it knows of: give its lengths in epochs, "
            f"of three steps or more (steps of an epoch: {steps_per_epoch}), or take progress_cosine"
        )
    epochs = max(1, total_steps // steps_per_epoch)
    return lambda step: released_progress(min(step, epochs * steps_per_epoch), epochs, steps_per_epoch - 1)


def weight_decay_at(step: int, start: float, end: float, total_steps: int) -> float:
    """Weight decay of a step, counted from 1: a cosine from `start` to `end`, which the last step reaches."""
    share = min(step - 1, total_steps - 1) / max(1, total_steps - 1)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))


def lr_scheduler(optimizer: Optimizer, schedule: Schedule, lr: float) -> LambdaLR:
    """torch's LambdaLR for a schedule with peak `lr`, to be stepped after every optimiser step.

    Each group keeps its own rate as the peak, so factors per group and batch scaling also scale warm-up and minimum.
    """
    return LambdaLR(optimizer, lambda completed: schedule(completed + 1) / lr)
