"""Losses against timm's, and against their formulas."""

from __future__ import annotations

import pytest
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from restrike.losses import binary_cross_entropy, cross_entropy, mesa_loss


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(6, 10, generator=torch.Generator().manual_seed(0))


HARD = torch.tensor([0, 1, 2, 3, 9, 9])


def soft() -> torch.Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).softmax(dim=1)


def test_soft_targets_equal_timm(logits):
    torch.testing.assert_close(cross_entropy(logits, soft()), SoftTargetCrossEntropy()(logits, soft()))


def test_label_smoothing_equals_timm(logits):
    expected = LabelSmoothingCrossEntropy(0.1)(logits, HARD)
    torch.testing.assert_close(cross_entropy(logits, HARD, label_smoothing=0.1), expected)


def test_label_smoothing_leaves_soft_targets_alone(logits):
    assert cross_entropy(logits, soft(), label_smoothing=0.5) == cross_entropy(logits, soft())


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_binary_cross_entropy_equals_timm(logits, threshold, sum_classes):
    theirs = BinaryCrossEntropy(0.1, target_threshold=threshold, sum_classes=sum_classes)
    options = {"threshold": threshold, "sum_classes": sum_classes}
    torch.testing.assert_close(binary_cross_entropy(logits, HARD, 0.1, **options), theirs(logits, HARD))
    torch.testing.assert_close(binary_cross_entropy(logits, soft(), 0.1, **options), theirs(logits, soft()))


def test_losses_are_float32_for_half_logits(logits):
    for loss in (cross_entropy(logits.half(), soft()), binary_cross_entropy(logits.half(), HARD)):
        assert loss.dtype == torch.float32
    assert mesa_loss(logits.half(), logits.half()).dtype == torch.float32


def test_mesa_loss_is_its_formula_and_sends_no_gradient_to_the_teacher(logits):
    student, teacher = logits.clone().requires_grad_(), logits.flip(0).clone().requires_grad_()
    p, q = (student / 3).softmax(dim=1), (teacher / 3).softmax(dim=1)
    expected = 50 * (q * (q.log() - p.log())).sum() / len(logits)
    loss = mesa_loss(student, teacher)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.grad is not None and teacher.grad is None


def test_targets_of_a_wrong_shape_are_named(logits):
    with pytest.raises(ValueError, match=r"expected targets of shape \(6, 10\).*got \(6, 9\)"):
        cross_entropy(logits, soft()[:, :9])
    with pytest.raises(ValueError, match=r"expected targets of shape \(6,\)"):
        binary_cross_entropy(logits, HARD[:5])
