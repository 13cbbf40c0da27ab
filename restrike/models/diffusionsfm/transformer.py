"""The diffusion transformer over the patches of all views (DiT, arXiv 2212.09748; DiffusionSfM, arXiv 2505.05473).

One sequence of V · N tokens a scene, no masks. The time enters through shifts, scales and gates alone (adaLN), so they
can be computed once for every time that a sampler visits; `Modulations` carries them in.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from restrike.models.diffusionsfm.embeddings import PositionTables, TimestepEmbedder
from restrike.models.layers.attention import Attention
from restrike.models.layers.block import run
from restrike.models.layers.linear import Linear

_EPS = 1e-6


class Modulations(NamedTuple):
    """adaLN outputs of T times: [T, 6 dim] of each block, [T, 2 dim] of the last layer."""

    blocks: list[Tensor]
    final: Tensor


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), GELU by its tanh approximation."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift: x [B, N, dim]; shift, scale [B or 1, dim]. The norm has no parameters."""
    normed = F.layer_norm(x, x.shape[-1:], eps=_EPS)
    return normed * (1 + scale[:, None]) + shift[:, None]


class RayBlock(nn.Module):
    """x += gate₁ attn(modulate₁(x)); x += gate₂ mlp(modulate₂(x))."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, time: Tensor, modulation: Tensor | None = None, num_sequences: int = 1) -> Tensor:
        """x [B, N, dim] under the time embedding [B or 1, dim], or under its `adaLN_modulation` made before.

        `num_sequences` > 1: tokens attend only within their share of the sequence.
        """
        modulation = self.adaLN_modulation(time) if modulation is None else modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        attended = rearrange(modulate(x, shift1, scale1), "b (s n) c -> (b s) n c", s=num_sequences)
        attended = rearrange(self.attn(attended), "(b s) n c -> b (s n) c", s=num_sequences)
        x = x + gate1[:, None] * attended
        return x + gate2[:, None] * self.mlp(modulate(x, shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated norm, then one linear layer."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.linear = Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, time: Tensor, modulation: Tensor | None = None) -> Tensor:
        """[B, N, dim] -> [B, N, out_channels]."""
        modulation = self.adaLN_modulation(time) if modulation is None else modulation
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class RayTransformer(nn.Module):
    """Features of patches to rays of patches.

    Args:
        in_channels: Of each patch.
        out_channels: Of each patch.
        width: Patches per side of a view.
        hidden_size: Width of the tokens.
        depth: Blocks.
        num_heads: Of each block.
        mlp_ratio: Hidden width of the MLPs over `hidden_size`.
        max_num_images: Views of a call, at most.
        attend_within_views: Every block attends within one view only (an option of the release that no recipe uses).
    """

    blocks: Any
    x_embedder: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 8,
        width: int = 16,
        hidden_size: int = 1152,
        depth: int = 16,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        max_num_images: int = 8,
        attend_within_views: bool = False,
    ) -> None:
        super().__init__()
        self.attend_within_views, self.grad_checkpointing = attend_within_views, False
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=1)
        self.x_pos_enc = PositionTables(max_num_images, width * width, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.blocks = nn.ModuleList(RayBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier, times N(0, 0.02), gates of the blocks 0. The last layer is not 0, unlike DiT's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
            nn.init.zeros_(block.adaLN_modulation[1].bias)

    def modulations(self, timesteps: Tensor) -> Modulations:
        """Of times [T]."""
        time = self.t_embedder(timesteps)
        blocks = [block.adaLN_modulation(time) for block in self.blocks]
        return Modulations(blocks, self.final_layer.adaLN_modulation(time))

    def forward(self, x: Tensor, time: Tensor | Modulations) -> Tensor:
        """[B, V, in_channels, h, w] at times [B] or [1] (or their `modulations`) -> [B, V, out_channels, h, w]."""
        tokens, _ = self.forward_features(x, time)
        return self.predict(tokens, time, x)

    def forward_features(
        self, x: Tensor, time: Tensor | Modulations, taps: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, V N, dim] after the last block, and outputs [B V, dim, h, w] of the blocks in `taps`."""
        batch, views, _, height, width = x.shape
        embedding = self.t_embedder(time) if isinstance(time, Tensor) else x.new_empty(0)
        ready = [None] * len(self.blocks) if isinstance(time, Tensor) else time.blocks
        tokens = self.x_embedder.proj(x.flatten(0, 1)).flatten(2).mT.unflatten(0, (batch, views))
        tokens = self.x_pos_enc(tokens).flatten(1, 2)
        maps = []
        sequences = views if self.attend_within_views else 1
        for i, (block, modulation) in enumerate(zip(self.blocks, ready, strict=True)):
            tokens = run(block, tokens, embedding, modulation, sequences, grad_checkpointing=self.grad_checkpointing)
            if i in taps:
                maps.append(rearrange(tokens, "b (v h w) c -> (b v) c h w", v=views, h=height, w=width))
        return tokens, maps

    def predict(self, tokens: Tensor, time: Tensor | Modulations, x: Tensor) -> Tensor:
        """The last layer, on tokens of an input `x`."""
        embedding, ready = (self.t_embedder(time), None) if isinstance(time, Tensor) else (tokens[:1, 0], time.final)
        out = self.final_layer(tokens, embedding, ready)
        return rearrange(out, "b (v h w) c -> b v c h w", v=x.shape[1], h=x.shape[-2], w=x.shape[-1])
