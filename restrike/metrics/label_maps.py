"""Accuracy where a model may answer with some of its classes only, or where several classes are right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from restrike.metrics.classification import TopKAccuracy

_NO_CLASS = -1


class SubsetTopKAccuracy(TopKAccuracy):
    """Top-k among `classes` alone; logits of others do not count (ImageNet-R and -A: arXiv 2006.16241, 1907.07174).

    Args:
        classes: Indices of the classes that are answers.
    """

    classes: Tensor

    def __init__(self, k: int, classes: Sequence[int]) -> None:
        super().__init__(k)
        self.register_buffer("classes", torch.tensor(classes), persistent=False)

    def update(self, logits: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Count a batch: logits [B, K], targets [B] class indices among `classes`, valid [B] bool."""
        highest = self.classes[logits[:, self.classes].topk(min(self.k, len(self.classes)), dim=1).indices]
        self.correct += ((highest == targets[:, None]).any(dim=1) & valid).sum()
        self.total += valid.sum()


class LabelSetTopKAccuracy(TopKAccuracy):
    """Share of samples that have one of their right classes among the k highest logits (ReaL: arXiv 2006.07159).

    Args:
        label_sets: Right classes; a sample's target is its row here.
    """

    label_sets: Tensor

    def __init__(self, k: int, label_sets: Sequence[Sequence[int]]) -> None:
        super().__init__(k)
        width = max(map(len, label_sets))
        rows = [[*labels, *[_NO_CLASS] * (width - len(labels))] for labels in label_sets]
        self.register_buffer("label_sets", torch.tensor(rows, dtype=torch.int32), persistent=False)

    def update(self, logits: Tensor, targets: Tensor, valid: Tensor) -> None:
        """Count a batch: logits [B, K], targets [B] rows of `label_sets`, valid [B] bool."""
        highest = logits.topk(min(self.k, logits.shape[1]), dim=1).indices
        hit = (highest[:, :, None] == self.label_sets[targets][:, None, :]).flatten(1).any(dim=1)
        self.correct += (hit & valid).sum()
        self.total += valid.sum()


def label_map_metrics(
    prefix: str = "",
    postfix: str = "",
    classes: Sequence[int] | None = None,
    label_sets: Sequence[Sequence[int]] | None = None,
) -> MetricCollection:
    """`top1` and `top5` under one `update(logits, targets, valid)`; at most one of the two maps is given."""
    metrics: dict[str, Metric | MetricCollection] = {}
    for k in (1, 5):
        if classes is not None:
            metrics[f"top{k}"] = SubsetTopKAccuracy(k, classes)
        elif label_sets is not None:
            metrics[f"top{k}"] = LabelSetTopKAccuracy(k, label_sets)
        else:
            metrics[f"top{k}"] = TopKAccuracy(k)
    return MetricCollection(metrics, prefix=prefix, postfix=postfix, compute_groups=False)
