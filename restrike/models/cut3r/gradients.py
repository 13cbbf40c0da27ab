"""Zero instead of absent gradients for parameters that a step happens not to use.

Data-parallel training waits for every parameter's gradient, and weight decay acts on a parameter only where it has
one. The release multiplies unused outputs by zero instead, which costs their whole computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _WithZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.zeros = [p.new_zeros(()).expand_as(p) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *ctx.zeros


def with_zero_gradients(x: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """`x` as it is; in a backward pass through it, trained `parameters` get a gradient of zero at least."""
    trained = [p for p in parameters if p.requires_grad]
    return _WithZeroGradients.apply(x, *trained) if trained and torch.is_grad_enabled() else x
