"""VGGT's loss of tracks (arXiv 2503.11651, section 3.4, after CoTracker 2, arXiv 2307.07635)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from restrike.geometry import full_precision
from restrike.losses.robust import masked_mean

_NEAR = 3.0  # pixels


class TrackLoss(NamedTuple):
    """Scalars: distance in pixels, and cross-entropies of visibility and of confidence."""

    coords: Tensor
    visibility: Tensor
    confidence: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum; the paper weighs it by 0.05."""
        return self.coords + self.visibility + self.confidence


def track_loss(
    coords: Sequence[Tensor],
    visibility_logits: Tensor,
    confidence_logits: Tensor,
    target_coords: Tensor,
    is_visible: Tensor,
    decay: float = 0.8,
) -> TrackLoss:
    """Loss of tracks that start at points of the first view.

    Args:
        coords: [B, V, N, 2] pixels of each round.
        visibility_logits: [B, V, N].
        confidence_logits: [B, V, N]; true is a last round within 3 pixels.
        target_coords: [B, V, N, 2] pixels.
        is_visible: [B, V, N] bool; tracks that are not visible in the first view count nowhere.
        decay: Round i of n has weight decay^(n - 1 - i) / n.
    """
    starts = is_visible[:, :1].expand_as(is_visible)
    n = len(coords)
    distance = target_coords.new_zeros((), dtype=torch.float32)
    for i, each in enumerate(coords):
        distance = distance + decay ** (n - 1 - i) / n * _distance(each, target_coords, starts & is_visible)
    error = (coords[-1].detach() - target_coords).norm(dim=-1)
    return TrackLoss(
        distance,
        _cross_entropy(visibility_logits, is_visible, starts),
        _cross_entropy(confidence_logits, error < _NEAR, starts & is_visible),
    )


@full_precision
def _distance(coords: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((coords - target).abs().mean(-1), mask)


@full_precision
def _cross_entropy(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none"), mask)
