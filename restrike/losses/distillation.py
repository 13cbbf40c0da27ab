"""MESA, sharpness-aware training for free (Du et al., arXiv 2205.14083), with the constants of FasterViT's release.

The release differs from the paper: temperature 3 and weight 50 are fixed, and the usual factor temperature² is absent.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def mesa_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0, weight: float = 50.0) -> Tensor:
    """weight · Σ q (log q − log p) / B with q = softmax(teacher / T), p = softmax(student / T), in float32.

    Args:
        student_logits: [B, K]; receives the gradient.
        teacher_logits: [B, K] of the weight average; detached here.
        temperature: T of both distributions.
        weight: Constant factor; the recipe's MESA ratio comes on top.
    """
    log_p = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_q = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    return weight * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
