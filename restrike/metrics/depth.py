"""How right is predicted depth, after the alignment that the protocol allows (CUT3R's evaluation).

A sequence [V, H, W] is aligned as one: for monocular depth, give each frame as a sequence of its own. All arithmetic
is float64; averages weigh every valid pixel alike. Protocols: `docs/protocols.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from restrike.geometry import masked_median

DepthAlignment = Literal["metric", "median", "scale", "scale_shift", "least_squares"]

_WEISZFELD_STEPS = 10
_WEISZFELD_EPS = 1e-8
_ADAM_STEPS = 1000
_ADAM_LR = 1e-4
_MIN_DEPTH = 1e-5  # predictions below are raised to it for the logarithm alone
_DELTAS = (1.25, 1.25**2, 1.25**3)
NAMES = ("abs_rel", "sq_rel", "rmse", "log_rmse", "delta@1.25", "delta@1.25^2", "delta@1.25^3")


class ScaleShift(NamedTuple):
    """depth -> scale · depth + shift, [...] each."""

    scale: Tensor
    shift: Tensor

    def apply(self, depth: Tensor) -> Tensor:
        """Map [..., N]."""
        return self.scale[..., None] * depth + self.shift[..., None]


def align_depth(predicted: Tensor, true: Tensor, valid: Tensor, alignment: DepthAlignment) -> ScaleShift:
    """Scale and shift of each sequence.

    Args:
        predicted: [..., N] float64.
        true: [..., N] float64.
        valid: [..., N] bool.
        alignment: "metric": none. "median": ratio of the lower medians. "scale": least absolute deviation, ten
            reweighted steps from the ratio of means. "scale_shift": the same error minimised by Adam, 1000 steps at
            1e-4 from the median ratio: far from converged where depths are large, and published so. "least_squares".
    """
    zero = true.new_zeros(true.shape[:-1])
    if alignment == "metric":
        return ScaleShift(zero + 1, zero)
    if alignment == "median":
        return ScaleShift(_median_ratio(predicted, true, valid), zero)
    if alignment == "scale":
        return ScaleShift(_absolute_scale(predicted, true, valid), zero)
    if alignment == "scale_shift":
        return _adam_scale_shift(predicted, true, valid)
    if alignment == "least_squares":
        return _least_squares(predicted, true, valid)
    raise ValueError(f"alignment: expected one of {', '.join(DepthAlignment.__args__)}, got {alignment!r}")  # type: ignore[attr-defined]


def depth_errors(predicted: Tensor, true: Tensor, valid: Tensor) -> Tensor:
    """Mean errors over valid pixels, [..., 7] float64 in the order of `NAMES`, from [..., N]; NaN without a pixel.

    The two root means are roots over the sequence's pixels.
    """
    predicted, true = predicted.double(), true.double()
    safe_true = torch.where(valid, true, 1.0)
    difference = predicted - safe_true
    logarithm = predicted.clamp(min=_MIN_DEPTH).log() - safe_true.log()
    ratio = torch.maximum(predicted / safe_true, safe_true / predicted)
    count = valid.sum(-1)

    def mean(term: Tensor) -> Tensor:
        return torch.where(valid, term, 0.0).sum(-1) / count

    # One term after another: a video has tens of millions of pixels. A prediction that is not positive is wrong by any
    # factor, and so is NaN.
    return torch.stack(
        [
            mean(difference.abs() / safe_true),
            mean(difference.square() / safe_true),
            mean(difference.square()).sqrt(),
            mean(logarithm.square()).sqrt(),
            *(mean(((ratio < delta) & (predicted > 0)).double()) for delta in _DELTAS),
        ],
        dim=-1,
    )


class DepthErrors(Metric):
    """AbsRel, SqRel, RMSE, LogRMSE and δ of sequences, averaged with the weight of their valid pixels.

    `compute` returns "abs_rel", "delta@1.25" and the other `NAMES`.

    Args:
        alignment: As in `align_depth`.
        max_depth: True depth at or above it is not evaluated (Sintel, Bonn: 70).
        clip: Aligned predictions above it are lowered to it (Sintel: 70).
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    pixels: Tensor

    def __init__(
        self, alignment: DepthAlignment = "scale", max_depth: float | None = None, clip: float | None = None
    ) -> None:
        super().__init__()
        known = DepthAlignment.__args__  # type: ignore[attr-defined]
        if alignment not in known:
            raise ValueError(f"alignment: expected one of {', '.join(known)}, got {alignment!r}")
        self.alignment, self.max_depth, self.clip = alignment, max_depth, clip
        self.add_state("total", torch.zeros(len(NAMES), dtype=torch.float64), "sum")
        self.add_state("pixels", torch.zeros((), dtype=torch.float64), "sum")

    def update(self, predicted: Tensor, true: Tensor, valid: Tensor | None = None) -> None:
        """Add sequences: z-depth [B, V, H, W] twice, true ≤ 0 or not finite where unknown; valid [B] bool."""
        if predicted.shape != true.shape or true.ndim != 4:
            raise ValueError(
                f"predicted and true depth: expected the same shape [B, V, H, W], "
                f"got {list(predicted.shape)} and {list(true.shape)}"
            )
        predicted, true = predicted.flatten(1).double(), true.flatten(1).double()
        used = (true > 0) & true.isfinite()
        if self.max_depth is not None:
            used &= true < self.max_depth
        if valid is not None:
            used &= valid[:, None]
        aligned = align_depth(predicted, true, used, self.alignment).apply(predicted)
        if self.clip is not None:
            aligned = aligned.clamp(max=self.clip)
        count = used.sum(-1, keepdim=True)
        errors = depth_errors(aligned, true, used)
        self.total += torch.where(count > 0, errors * count, 0.0).sum(0)
        self.pixels += count.sum()

    def compute(self) -> dict[str, Tensor]:
        """Name -> mean; NaN before the first valid pixel."""
        return dict(zip(NAMES, self.total / self.pixels, strict=True))


def _median_ratio(predicted: Tensor, true: Tensor, valid: Tensor) -> Tensor:
    return masked_median(true, valid) / masked_median(predicted, valid)


def _masked(mask: Tensor) -> Callable[[Tensor], Tensor]:
    def total(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum(-1)

    return total


def _absolute_scale(predicted: Tensor, true: Tensor, valid: Tensor) -> Tensor:
    total = _masked(valid)
    scale = total(true) / total(predicted)
    for _ in range(_WEISZFELD_STEPS):
        weights = 1 / ((scale[..., None] * predicted - true).abs() + _WEISZFELD_EPS)
        scale = total(weights * predicted * true) / total(weights * predicted.square())
    return scale


def _least_squares(predicted: Tensor, true: Tensor, valid: Tensor) -> ScaleShift:
    total, count = _masked(valid), valid.sum(-1)
    mean, true_mean = total(predicted) / count, total(true) / count
    centered = predicted - mean[..., None]
    scale = total(centered * (true - true_mean[..., None])) / total(centered.square())
    return ScaleShift(scale, true_mean - scale * mean)


@torch.inference_mode(False)
@torch.enable_grad()
def _adam_scale_shift(predicted: Tensor, true: Tensor, valid: Tensor) -> ScaleShift:
    predicted, true, valid = predicted.detach().clone(), true.detach().clone(), valid.clone()
    scale = _median_ratio(predicted, true, valid).requires_grad_()
    shift = torch.zeros_like(scale).requires_grad_()
    optimizer = torch.optim.Adam([scale, shift], lr=_ADAM_LR)
    for _ in range(_ADAM_STEPS):
        optimizer.zero_grad()
        residual = scale[..., None] * predicted + shift[..., None] - true
        torch.where(valid, residual, 0.0).abs().sum().backward()
        optimizer.step()
    return ScaleShift(scale.detach(), shift.detach())
