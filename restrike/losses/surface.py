"""Losses of how neighbouring pixels differ: image gradients and surface normals, at several scales (MiDaS, DUSt3R).

A confidence, where given, weighs each term as VGGT's regression does:
gamma · term · confidence - alpha · ln confidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from restrike.losses.robust import MAX_VALUE, masked_mean

_MIN_NORMALS = 10
_NORMAL_EPS = 1e-8


class Weighting(NamedTuple):
    """Confidence [B, H, W] and its constants."""

    confidence: Tensor
    gamma: float
    alpha: float

    def __call__(self, term: Tensor, confidence: Tensor) -> Tensor:
        return self.gamma * term * confidence - self.alpha * confidence.log()


def gradient_loss(prediction: Tensor, target: Tensor, valid: Tensor, weighting: Weighting | None = None) -> Tensor:
    """Differences of the error between horizontal and vertical neighbours, over one scale.

    As released, the log term of the weighting is not masked.

    Args:
        prediction: [B, H, W, C].
        target: [B, H, W, C].
        valid: [B, H, W] bool.
        weighting: Optional; see above.

    Returns:
        Scalar: sum over pairs of valid neighbours / valid entries.
    """
    error = torch.where(valid[..., None], prediction - target, 0.0)
    total = error.new_zeros(())
    for dim in (1, 2):
        count = error.shape[dim] - 1
        first, second = (error.narrow(dim, start, count) for start in (0, 1))
        both = (valid.narrow(dim, 0, count) & valid.narrow(dim, 1, count))[..., None]
        term = ((second - first).abs() * both).clamp(max=MAX_VALUE)
        if weighting is not None:
            term = weighting(term, weighting.confidence.narrow(dim, 1, count)[..., None])
        total = total + term.sum()
    entries = valid.sum() * prediction.shape[-1]
    return torch.where(entries > 0, total / entries.clamp(min=1), 0.0 * total)


def normal_loss(prediction: Tensor, target: Tensor, valid: Tensor, weighting: Weighting | None = None) -> Tensor:
    """1 - cos of the angle between normals of two maps of points; arguments as `gradient_loss`, C = 3.

    A pixel has four normals, one for each pair of adjacent neighbours; those with three valid pixels count. 0 where
    there are fewer than ten.
    """
    ours, exists = surface_normals(torch.where(valid[..., None], prediction, 0.0), valid)
    theirs, _ = surface_normals(torch.where(valid[..., None], target, 0.0), valid)
    cosine = (ours * theirs).sum(-1).clamp(-1 + _NORMAL_EPS, 1 - _NORMAL_EPS)
    term = 1 - cosine
    if weighting is not None:
        term = weighting(term, weighting.confidence[None])
    return masked_mean(term, exists, _MIN_NORMALS)


def surface_normals(points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Four unit normals per pixel of points [B, H, W, 3], [4, B, H, W, 3], and which exist, [4, B, H, W]."""
    padded = F.pad(points, (0, 0, 1, 1, 1, 1))
    is_valid = F.pad(valid, (1, 1, 1, 1))

    def window(x: Tensor, row: int, column: int) -> Tensor:
        return x[:, row : row + points.shape[1], column : column + points.shape[2]]

    around = [(0, 1), (1, 0), (2, 1), (1, 2)]  # up, left, down, right
    arms = [window(padded, *place) - points for place in around]
    exist = [window(is_valid, *place) for place in around]
    normals = torch.stack([torch.linalg.cross(arms[i], arms[(i + 1) % 4]) for i in range(4)])
    exists = torch.stack([valid & exist[i] & exist[(i + 1) % 4] for i in range(4)])
    return F.normalize(normals, dim=-1, eps=_NORMAL_EPS), exists


def multi_scale(
    loss: Callable[[Tensor, Tensor, Tensor, Weighting | None], Tensor],
    scales: int,
    prediction: Tensor,
    target: Tensor,
    valid: Tensor,
    weighting: Weighting | None = None,
) -> Tensor:
    """Mean of `loss` over every pixel, every second, every fourth …"""
    total = prediction.new_zeros(())
    for step in (2**scale for scale in range(scales)):

        def pick(x: Tensor, step: int = step) -> Tensor:
            return x[:, ::step, ::step]

        picked = weighting and weighting._replace(confidence=pick(weighting.confidence))
        total = total + loss(pick(prediction), pick(target), pick(valid), picked)
    return total / scales
