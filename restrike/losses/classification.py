"""Losses of image classification.

One function takes both kinds of target: class indices, and the soft rows that mixup and cutmix make. Label smoothing
belongs to indices alone, because mixing has already smoothed its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """−Σ t · log_softmax(logits), computed in float32 under any autocast.

    Args:
        logits: [B, K].
        targets: [B] int64 class indices, or [B, K] probabilities.
        label_smoothing: For indices: off-class weight ε/K, on-class weight 1 − ε + ε/K.
        reduction: "mean" over the batch, "sum", or "none" for [B].

    Raises:
        ValueError: targets fit neither form.
    """
    _check_targets(logits, targets)
    smoothing = 0.0 if targets.is_floating_point() else label_smoothing
    if targets.is_floating_point():
        targets = targets.float()
    return F.cross_entropy(logits.float(), targets, reduction=reduction, label_smoothing=smoothing)


def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    threshold: float | None = None,
    sum_classes: bool = False,
) -> Tensor:
    """Every class as its own yes-or-no question (Wightman et al., "ResNet strikes back", arXiv 2110.00476).

    Args:
        logits: [B, K].
        targets: [B] int64 class indices, or [B, K] probabilities.
        label_smoothing: For indices: off-class target ε/K, on-class target 1 − ε + ε/K.
        threshold: Targets above it become 1, the others 0, as the paper does after mixing.
        sum_classes: Sum over the classes before the mean over the batch; else the mean over both.
    """
    _check_targets(logits, targets)
    if targets.is_floating_point():
        dense = targets.float()
    else:
        off = label_smoothing / logits.shape[1]
        dense = torch.full_like(logits, off, dtype=torch.float32)
        dense.scatter_(1, targets[:, None], 1.0 - label_smoothing + off)
    if threshold is not None:
        dense = (dense > threshold).float()
    loss = F.binary_cross_entropy_with_logits(logits.float(), dense, reduction="none")
    return loss.sum(dim=1).mean() if sum_classes else loss.mean()


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    expected = logits.shape if targets.is_floating_point() else logits.shape[:1]
    if targets.shape != expected:
        raise ValueError(
            f"expected targets of shape {tuple(expected)} ({targets.dtype}) for logits {tuple(logits.shape)}, "
            f"got {tuple(targets.shape)}; pass class indices [B] as integers or probabilities [B, K] as floats"
        )
