"""Multi-head self-attention over one fused projection, with optional normalised and rotated queries and keys."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from restrike.models.layers.linear import Linear
from restrike.models.layers.rotary import RotaryTable, rotate_channels


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v. Rows of `qkv` are ordered q, k, v, then head.

    Args:
        dim: Width.
        num_heads: Divides `dim`.
        qkv_bias: Bias of the fused projection.
        qk_norm: LayerNorm over the channels of each head on queries and on keys, before any rotation.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, qk_norm: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the width, got {num_heads} heads for width {dim}")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, rotary: RotaryTable | None = None) -> Tensor:
        """[B, N, dim] -> [B, N, dim]; `rotary` is the table of the N positions."""
        q, k, v = rearrange(self.qkv(x), "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate_channels(q, rotary), rotate_channels(k, rotary)
        # Norms and rotation run in float32; the products take the type that autocast or the weights chose.
        attended = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(rearrange(attended, "b heads n d -> b n (heads d)"))
