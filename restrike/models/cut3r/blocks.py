"""CUT3R's blocks beside the plain one: attention between two sequences, and norms that a pose token modulates.

Where there is one key only, its weight is 1 whatever the query: queries, keys and their norm are then left out. Their
parameters stay in the checkpoint (`models.cut3r.model` gives them zero gradients, so that decay acts as published).
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from restrike.models.layers.attention import Attention
from restrike.models.layers.linear import Linear, linear
from restrike.models.layers.mlp import Mlp
from restrike.models.layers.rotary import RotaryTable, rotate_channels

NORM_EPS = 1e-6


class HalfRotaryAttention(Attention):
    """Self-attention that rounds queries and keys to float16 before and after turning them, as CroCo's kernel does.

    The released encoder was trained and is evaluated so; outputs of the whole model move by 1e-4 to 5e-4.
    """

    def forward(self, x: Tensor, rotary: RotaryTable | None = None) -> Tensor:
        """[B, N, dim] -> [B, N, dim]."""
        assert rotary is not None
        q, k, v = rearrange(self.qkv(x), "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.num_heads)
        q, k = (rotate_channels(part.half(), rotary).half().to(v.dtype) for part in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(attended, "b heads n d -> b n (heads d)"))


class CrossAttention(nn.Module):
    """Queries of one sequence, keys and values of another.

    Args:
        dim: Width of both.
        num_heads: Divides `dim`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the width, got {num_heads} heads for width {dim}")
        self.num_heads = num_heads
        self.projq, self.projk, self.projv = (Linear(dim, dim) for _ in range(3))
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Tensor, y: Tensor, rotary_x: RotaryTable | None = None, rotary_y: RotaryTable | None = None
    ) -> Tensor:
        """x [B, N, dim] attends to y [B, M, dim] -> [B, N, dim]; tables are those of N and of M positions."""
        q, k, v = (
            rearrange(part, "b n (heads d) -> b heads n d", heads=self.num_heads)
            for part in (self.projq(x), self.projk(y), self.projv(y))
        )
        if rotary_x is not None and rotary_y is not None:
            q, k = rotate_channels(q, rotary_x), rotate_channels(k, rotary_y)
        attended = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(rearrange(attended, "b heads n d -> b n (heads d)"))

    def attend_to_one(self, y: Tensor) -> Tensor:
        """What every query gets of a single key: y [B, 1, dim] -> [B, 1, dim]."""
        return self.proj(self.projv(y))


class DecoderBlock(nn.Module):
    """x += attn(norm1 x); x += cross_attn(norm2 x, norm_y y); x += mlp(norm3 x).

    Args:
        dim: Width of both sequences.
        num_heads: Divides `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm3 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm_y = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(
        self, x: Tensor, y: Tensor, rotary_x: RotaryTable | None = None, rotary_y: RotaryTable | None = None
    ) -> Tensor:
        """x [B, N, dim], y [B, M, dim] -> [B, N, dim]; y itself does not change."""
        x = x + self._attend(self.norm1(x), rotary_x)
        if y.shape[1] == 1:
            x = x + self.cross_attn.attend_to_one(self.norm_y(y))
        else:
            x = x + self.cross_attn(self.norm2(x), self.norm_y(y), rotary_x, rotary_y)
        return x + self.mlp(self.norm3(x))

    def _attend(self, x: Tensor, rotary: RotaryTable | None) -> Tensor:
        if x.shape[1] > 1:
            return self.attn(x, rotary)
        qkv, dim = self.attn.qkv, x.shape[-1]
        return self.attn.proj(linear(x, qkv.weight[2 * dim :], qkv.bias[2 * dim :]))


class ModulatedNorm(nn.Module):
    """LN(x) (1 + scale) + shift, both from a condition."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, N, dim], condition [B, dim] -> [B, N, dim]."""
        shift, scale = self.mlp(condition)[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class ModulatedBlock(nn.Module):
    """The plain block with modulated norms: the head's way from the view's own camera to the first view's."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = ModulatedNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, condition: Tensor, rotary: RotaryTable | None = None) -> Tensor:
        """x [B, N, dim], condition [B, dim] -> [B, N, dim]."""
        x = x + self.attn(self.norm1(x, condition), rotary)
        return x + self.mlp(self.norm2(x, condition))
