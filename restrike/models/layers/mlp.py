"""The transformer's two-layer MLP."""

from __future__ import annotations

from torch import Tensor, nn

from restrike.models.layers.linear import Linear, linear_gelu


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) with exact GELU; dropout after each layer. `out_dim` is `dim` unless given."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, out_dim: int | None = None) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim if out_dim is None else out_dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[.., dim] -> [.., out_dim]."""
        hidden = self.drop(linear_gelu(x, self.fc1.weight, self.fc1.bias))
        return self.drop(self.fc2(hidden))
