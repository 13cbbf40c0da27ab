"""The pre-norm transformer block of DINOv2, VGGT and CUT3R's encoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from restrike.models.layers.attention import Attention
from restrike.models.layers.layer_scale import LayerScale
from restrike.models.layers.mlp import Mlp
from restrike.models.layers.rotary import RotaryTable


class Block(nn.Module):
    """x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x))).

    Args:
        dim: Width.
        num_heads: Divides `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        qkv_bias: Bias of the fused projection.
        qk_norm: See `Attention`.
        init_values: Start of the layer scales; None leaves them out.
        norm_eps: Of the block's two norms; 1e-6 in DINOv2, 1e-5 in VGGT's own blocks.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)

    def forward(self, x: Tensor, rotary: RotaryTable | None = None) -> Tensor:
        """[B, N, dim] -> [B, N, dim]; `rotary` is the table of the N positions."""
        x = x + self.ls1(self.attn(self.norm1(x), rotary))
        return x + self.ls2(self.mlp(self.norm2(x)))


def run(module: nn.Module, *args: Any, grad_checkpointing: bool = False) -> Any:
    """`module(*args)`; with `grad_checkpointing`, its activations are computed again in the backward pass."""
    if grad_checkpointing and module.training and torch.is_grad_enabled():
        # Nothing here is random, so the generators' states need no saving.
        return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
    return module(*args)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *args: Any, grad_checkpointing: bool = False) -> Tensor:
    """`x` through `blocks`, each called with `args` too."""
    for block in blocks:
        x = run(block, x, *args, grad_checkpointing=grad_checkpointing)
    return x
