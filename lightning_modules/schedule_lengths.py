"""From epochs to optimiser steps: what a schedule's lengths are in this run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class ScheduleLengths:
    """Lengths in optimiser steps."""

    warmup_steps: int
    total_steps: int
    steps_per_epoch: int | None = None  # None where nothing is given in epochs


def steps_per_epoch(trainer: Trainer) -> int:
    """Optimiser steps of one epoch of this run.

    Raises:
        ValueError: the training loader has no length.
    """
    _ = trainer.estimated_stepping_batches  # sets up the training loader, so that its length is known
    batches = trainer.num_training_batches
    if math.isinf(batches):
        raise ValueError("the training loader has no length: set model.schedule_steps_per_epoch (or give all in steps)")
    return math.ceil(batches / trainer.accumulate_grad_batches)


def schedule_lengths(
    trainer: Trainer,
    *,
    warmup_epochs: float,
    warmup_steps: int | None,
    schedule_epochs: float | None,
    schedule_steps: int | None,
    per_epoch: int | None,
) -> ScheduleLengths:
    """Resolve lengths that a recipe gives in epochs or in steps; without either, the schedule ends with the run.

    Raises:
        ValueError: a length is given in both units, or cannot be known.
    """
    for name, in_epochs, in_steps in (
        ("warmup", warmup_epochs, warmup_steps),
        ("schedule", schedule_epochs, schedule_steps),
    ):
        if in_epochs and in_steps is not None:
            raise ValueError(f"model.{name}_epochs={in_epochs} and model.{name}_steps={in_steps}: set one to null")
    needs_epochs = (warmup_epochs and warmup_steps is None) or schedule_steps is None
    known = per_epoch or (steps_per_epoch(trainer) if needs_epochs else None)
    per_epoch = known or 1
    warmup = warmup_steps if warmup_steps is not None else round(warmup_epochs * per_epoch)
    if schedule_steps is not None:
        total = schedule_steps
    elif schedule_epochs is not None:
        total = round(schedule_epochs * per_epoch)
    elif trainer.max_epochs is not None and trainer.max_epochs > 0:
        total = trainer.max_epochs * per_epoch
    elif trainer.max_steps > 0:
        total = trainer.max_steps
    else:
        raise ValueError("the run has no end: set trainer.max_epochs or max_steps, or model.schedule_epochs or _steps")
    if trainer.fast_dev_run:
        warmup = min(warmup, total - 1)  # a run of a few steps, whose schedule nobody looks at
    return ScheduleLengths(warmup, total, known)
