"""Accuracy and loss count valid rows, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from restrike.losses import cross_entropy
from restrike.metrics import TopKAccuracy, classification_metrics, majority_class_accuracy


def batches(num_classes: int = 10):
    generator = torch.Generator().manual_seed(0)
    for size in (7, 5, 3):
        logits = torch.randn(size, num_classes, generator=generator)
        yield logits, torch.randint(0, num_classes, (size,), generator=generator)


@pytest.mark.parametrize("k", [1, 5])
def test_top_k_equals_torchmetrics(k):
    ours, theirs = TopKAccuracy(k), MulticlassAccuracy(10, top_k=k, average="micro")
    for logits, targets in batches():
        ours.update(logits, targets, torch.ones_like(targets, dtype=torch.bool))
        theirs.update(logits, targets)
    torch.testing.assert_close(ours.compute(), theirs.compute())


def test_padding_rows_count_nowhere_whatever_they_hold():
    plain, padded = classification_metrics("val/"), classification_metrics("val/")
    for logits, targets in batches():
        plain.update(logits, targets, torch.ones_like(targets, dtype=torch.bool))
        rubbish = torch.full((2, 10), torch.nan)
        valid = torch.arange(len(targets) + 2) < len(targets)
        padded.update(torch.cat([logits, rubbish]), torch.cat([targets, torch.tensor([-1, 3])]), valid)
    assert plain.compute() == padded.compute()


def test_loss_is_the_mean_over_samples_not_over_batches():
    metrics = classification_metrics()
    for logits, targets in batches():
        metrics.update(logits, targets, torch.ones_like(targets, dtype=torch.bool))
    logits, targets = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    torch.testing.assert_close(metrics.compute()["loss"], cross_entropy(logits, targets))


def test_top1_and_top5_stay_apart_after_a_first_batch_that_gives_them_equal_counts():
    metrics, valid = classification_metrics(), torch.ones(1, dtype=torch.bool)
    metrics.update(torch.arange(10.0)[None], torch.tensor([9]), valid)  # both right
    metrics.update(torch.arange(10.0)[None], torch.tensor([6]), valid)  # only top-5 right
    values = metrics.compute()
    assert (values["top1"], values["top5"]) == (0.5, 1.0)


def test_top5_of_three_classes_is_one():
    metric = TopKAccuracy(5)
    metric.update(torch.eye(3), torch.tensor([2, 1, 0]), torch.ones(3, dtype=torch.bool))
    assert metric.compute() == 1


def test_names_carry_prefix_and_postfix():
    names = classification_metrics("test/", "_ema").keys()
    assert sorted(names) == ["test/loss_ema", "test/top1_ema", "test/top5_ema"]


def test_majority_class():
    assert majority_class_accuracy([1, 6, 1]) == 0.75
    with pytest.raises(ValueError, match="at least one sample"):
        majority_class_accuracy([])
