"""VGGT's learning rate by progress: the share of the run that is done, instead of a step (arXiv 2503.11651's release).

Its trainer counts 801 iterations in an epoch of 800, and the last one, at progress 1, keeps the rate before it:
`released_progress` counts so, `progress` as one would.
"""

from __future__ import annotations

import math

_EPS = 1e-6  # the release's guard at the end of the warm-up


def progress(step: int, total_steps: int) -> float:
    """Share of the run that is done before optimiser step `step`, counted from 1."""
    return min(step - 1, total_steps) / total_steps


def released_progress(step: int, epochs: int = 20, steps_per_epoch: int = 800) -> float:
    """Progress as VGGT's trainer has it at optimiser step `step`, counted from 1, of epochs · (steps_per_epoch + 1)."""
    epoch, i = divmod(step - 1, steps_per_epoch + 1)
    where = (epoch + i / steps_per_epoch) / epochs
    return where if where < 1 else (epoch + (i - 1) / steps_per_epoch) / epochs


def linear_warmup_cosine(
    where: float, *, lr: float, warmup_lr: float = 1e-8, min_lr: float = 1e-8, warmup: float = 0.05
) -> float:
    """Learning rate at progress `where`: linear to the peak, then a cosine.

    Args:
        where: In [0, 1].
        lr: Peak.
        warmup_lr: Where the warm-up starts.
        min_lr: Where the cosine ends.
        warmup: Share of the run that the warm-up takes.
    """
    if where + _EPS <= warmup:
        share = where / warmup
        return lr * share + warmup_lr * (1 - share)
    share = (where - warmup) / (1 - warmup)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * share))
