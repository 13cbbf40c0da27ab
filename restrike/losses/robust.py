"""Means over valid entries that neither a NaN nor a few outliers can take over; the device is never waited for."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_VALUE = 100.0
_FEW = 1000  # entries up to which nothing is filtered


def finite_clamp(x: Tensor, limit: float = MAX_VALUE) -> Tensor:
    """NaN and infinities become 0, the rest is clamped to ±limit; no gradient where either happened."""
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(-limit, limit)


def masked_mean(x: Tensor, mask: Tensor, min_count: int = 1) -> Tensor:
    """Mean of `x` where `mask`, a scalar; 0 (with a graph) where fewer than `min_count` entries are."""
    count = mask.sum()
    mean = torch.where(mask, x, 0.0).sum() / count.clamp(min=1)
    return torch.where(count >= min_count, mean, 0.0 * mean)


def nearest_rank_quantile(x: Tensor, quantile: float, mask: Tensor | None = None) -> Tensor:
    """The k-th smallest entry, k = round(quantile · (n - 1)) from 0, halves rounded to even.

    Args:
        x: Any shape; without NaN.
        quantile: In [0, 1].
        mask: Entries that count, as `x`; None for all. At least one has to.
    """
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    ordered = torch.where(mask, x, torch.inf).flatten().sort().values
    rank = (quantile * (mask.sum() - 1).double()).round().long()
    return ordered.index_select(0, rank.clamp(min=0)[None])[0]  # an index of its own would wait for the device


def quantile_filter(x: Tensor, mask: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Drop the largest entries of a loss, as VGGT's release does.

    Values are clamped to at most 100, and those below the quantile are kept; all, where 1000 or fewer would remain. Up
    to 1000 entries are left as they are. (The release draws a million entries where there are more than 10⁸; here all
    are used.)

    Args:
        x: Any shape.
        mask: Entries that count, as `x`.
        quantile: In (0, 1); any other value keeps everything as it is.

    Returns:
        The values, clamped where filtered, and which of them to average.
    """
    if not 0 < quantile < 1:
        return x, mask
    clamped = x.clamp(max=MAX_VALUE)
    below = mask & (clamped < nearest_rank_quantile(clamped.detach(), quantile, mask))
    is_small = mask.sum() <= _FEW
    keep = torch.where(is_small | (below.sum() <= _FEW), mask, below)
    return torch.where(is_small, x, clamped), keep
