"""VGGT's loss of maps, for depth and for points alike (arXiv 2503.11651, section 3.4).

As released, the residual counts twice: weighed by the confidence, and plain. The sum is negative once the confidence
is high, because of - alpha · ln confidence; that is no fault.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from restrike.geometry import full_precision
from restrike.losses.robust import finite_clamp, masked_mean, quantile_filter
from restrike.losses.surface import Weighting, gradient_loss, multi_scale, normal_loss

SurfaceTerm = Literal["", "grad", "normal", "grad_conf", "normal_conf"]
_MIN_VALID = 100  # pixels in the batch below which the loss is 0
_SCALES = {"grad": 4, "normal": 3}


class DenseLoss(NamedTuple):
    """Three scalars: weighed residual, plain residual, differences between neighbours."""

    confidence: Tensor
    regression: Tensor
    gradient: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.confidence + self.regression + self.gradient


@full_precision
def dense_loss(
    prediction: Tensor,
    confidence: Tensor,
    target: Tensor,
    valid: Tensor,
    surface: SurfaceTerm = "grad",
    valid_range: float = 0.98,
    gamma: float = 1.0,
    alpha: float = 0.2,
) -> DenseLoss:
    """Loss of a map with confidence, in float32.

    Args:
        prediction: [B, V, H, W, C].
        confidence: [B, V, H, W] > 0.
        target: [B, V, H, W, C].
        valid: [B, V, H, W] bool.
        surface: "grad" (VGGT's depth) or "normal" (its points), with "_conf" weighed by the confidence; "" for none.
        valid_range: Quantile of the residuals above which they are dropped; outside (0, 1) keeps all.
        gamma: Weight of the weighed residual.
        alpha: Weight of - ln confidence.

    Returns:
        DenseLoss; zeros (with a graph) where fewer than 100 pixels are valid.
    """
    if surface not in get_args(SurfaceTerm):
        raise ValueError(f"surface: expected one of {get_args(SurfaceTerm)}, got {surface!r}")
    target = finite_clamp(target)
    # Replaced, not multiplied: nothing at an invalid pixel may reach the gradient.
    difference = torch.where(valid[..., None], target - prediction, 0.0)
    residual = finite_clamp(difference.norm(dim=-1))
    trusted = torch.where(valid, confidence, 1.0)
    weighed = finite_clamp(gamma * residual * trusted - alpha * trusted.log())
    terms = [_filtered_mean(weighed, valid, valid_range), _filtered_mean(residual, valid, valid_range)]
    terms.append(_surface(prediction, confidence, target, valid, surface, gamma, alpha))
    is_enough = valid.sum() >= _MIN_VALID
    return DenseLoss(*(torch.where(is_enough, term, 0.0 * term) for term in terms))


def _filtered_mean(x: Tensor, valid: Tensor, quantile: float) -> Tensor:
    values, keep = quantile_filter(x, valid, quantile)
    return masked_mean(finite_clamp(values), keep)


def _surface(
    prediction: Tensor, confidence: Tensor, target: Tensor, valid: Tensor, kind: str, gamma: float, alpha: float
) -> Tensor:
    if not kind:
        return prediction.new_zeros(())
    weighting = Weighting(confidence.flatten(0, 1), gamma, alpha) if kind.endswith("_conf") else None
    name = kind.removesuffix("_conf")
    loss = gradient_loss if name == "grad" else normal_loss
    prediction, target, valid = (x.flatten(0, 1) for x in (prediction, target, valid))
    return multi_scale(loss, _SCALES[name], prediction, target, valid, weighting)
