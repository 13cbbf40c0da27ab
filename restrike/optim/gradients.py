"""Gradient clipping that hands back the norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None = None) -> Tensor | None:
    """Global L2 norm of the gradients, which are scaled down in place to `max_norm` where they exceed it.

    Sharded gradients (DTensor) count whole, so all ranks must call it. The host does not wait for the device. Scaling
    is by max_norm / (norm + 1e-6), at most 1, as in `torch.nn.utils.clip_grad_norm_`.

    Returns:
        The norm before clipping, a scalar tensor; None when no parameter has a gradient.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    if not with_gradient:
        return None
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
