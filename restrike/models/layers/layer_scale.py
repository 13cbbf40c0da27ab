"""A learned factor per channel on a residual branch (CaiT, arXiv 2103.17239)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """x · gamma. Under autocast the product is float32, which keeps the residual stream in float32."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """[.., dim] -> [.., dim]."""
        return x * self.gamma
