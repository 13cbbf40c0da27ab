"""The pre-norm transformer block of DINOv2, VGGT and CUT3R's encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from restrike.models.layers.attention import Attention
from restrike.models.layers.layer_scale import LayerScale
from restrike.models.layers.mlp import Mlp
from restrike.models.layers.rotary import RotaryTable

Checkpointing = bool | Literal["selective"]

# Kept by "selective"; norms, activations, rotations and sums are computed again, which costs next to nothing.
_PRODUCTS = {
    "aten": (
        "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "mkldnn": ("_linear_pointwise",),
}  # fmt: skip


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


def run(module: nn.Module, *args: Any, grad_checkpointing: Checkpointing = False) -> Any:
    """`module(*args)`; with `grad_checkpointing`, its activations are computed again in the backward pass."""
    if grad_checkpointing and module.training and torch.is_grad_enabled():
        return run_checkpointed(module, *args, mode=grad_checkpointing)
    return module(*args)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *args: Any, grad_checkpointing: Checkpointing = False) -> Tensor:
    """`x` through `blocks`, each called with `args` too."""
    for block in blocks:
        x = run(block, x, *args, grad_checkpointing=grad_checkpointing)
    return x


def run_checkpointed(function: Callable[..., Any], *args: Any, mode: Checkpointing) -> Any:
    """`function(*args)`, of which the backward pass computes again: all (True), or all but products ("selective").

    Nothing in it may be random: the generators' states are not saved.
    """
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _products())
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)


def check_checkpointing(mode: Checkpointing) -> None:
    """Raises ValueError for what `grad_checkpointing` does not know."""
    if mode not in (True, False, "selective"):
        raise ValueError(f"grad_checkpointing: expected true, false or 'selective', got {mode!r}")


@functools.cache
def _products() -> list[Any]:
    libraries = ((getattr(torch.ops, library), names) for library, names in _PRODUCTS.items())
    return [getattr(ops, name).default for ops, names in libraries for name in names if hasattr(ops, name)]
