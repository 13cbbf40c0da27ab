"""Top-k accuracy and mean loss over the valid rows of a batch.

Evaluation batches may be padded so that every rank has as many: rows with valid=False count nowhere. The mask is
applied by multiplication, since indexing with it (as torchmetrics' own `ignore_index` does) would make the host wait
for the device at every batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection


class TopKAccuracy(Metric):
    """Share of samples whose class is among the k highest logits; counts are integers, so any split adds up exactly.

    With k classes or fewer it is 1 by definition.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.k = k
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Count a batch: logits [B, K], targets [B] class indices, valid [B] bool."""
        highest = logits.topk(min(self.k, logits.shape[1]), dim=1).indices
        hit = (highest == targets[:, None]).any(dim=1) & valid
        self.correct += hit.sum()
        self.total += valid.sum()

    def compute(self) -> Tensor:
        """Accuracy in [0, 1]; 0 before the first sample."""
        return self.correct / self.total.clamp(min=1)


class MeanCrossEntropy(Metric):
    """Mean cross-entropy of the valid rows (float32: there is no float64 on Apple's devices)."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    loss_sum: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Add a batch: logits [B, K], targets [B] class indices, valid [B] bool."""
        # `where` rather than a product: a padding row may hold anything, and 0 · NaN is NaN.
        losses = F.cross_entropy(logits.float(), torch.where(valid, targets, 0), reduction="none")
        self.loss_sum += torch.where(valid, losses, 0.0).sum()
        self.total += valid.sum()

    def compute(self) -> Tensor:
        """Mean loss; 0 before the first sample."""
        return self.loss_sum / self.total.clamp(min=1)


def classification_metrics(prefix: str = "", postfix: str = "") -> MetricCollection:
    """`loss`, `top1` and `top5` under one `update(logits, targets, valid)`; names become prefix + name + postfix."""
    metrics: dict[str, Metric | MetricCollection] = {
        "loss": MeanCrossEntropy(),
        "top1": TopKAccuracy(1),
        "top5": TopKAccuracy(5),
    }
    # Compute groups would merge top1 and top5 for ever if the first batch happens to give them equal counts.
    return MetricCollection(metrics, prefix=prefix, postfix=postfix, compute_groups=False)


def majority_class_accuracy(class_counts: Sequence[int]) -> float:
    """Accuracy of always answering the most frequent class.

    Args:
        class_counts: Number of samples of each class.

    Raises:
        ValueError: no samples.
    """
    total = sum(class_counts)
    if total == 0:
        raise ValueError("expected at least one sample in class_counts, got none; is the split empty?")
    return max(class_counts) / total
