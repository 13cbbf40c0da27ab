"""The tracker's transformer: attention over time along each track, and over tracks through a few virtual ones.

After CoTracker (arXiv 2307.07635). Unusual: a block adds its branches to the *normalised* input, not to the input.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from restrike.models.layers.linear import Linear
from restrike.models.layers.mlp import Mlp


class TrackAttention(nn.Module):
    """Self-attention, or with `is_cross` attention to a context, then an MLP."""

    attn: nn.MultiheadAttention
    cross_attn: nn.MultiheadAttention

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, is_cross: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        if is_cross:
            self.norm_context = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.add_module("cross_attn" if is_cross else "attn", attention)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, N, dim] -> [B, N, dim]; `context` is [B, M, dim]."""
        x = self.norm1(x)
        if context is not None:
            context = self.norm_context(context)
            x = x + self.cross_attn(x, context, context, need_weights=False)[0]
        else:
            x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TrackFormer(nn.Module):
    """Changes of tracks from what is known of them.

    Args:
        input_dim: Channels that describe a track in a frame.
        output_dim: Channels of the change: 2 coordinates and the features.
        hidden_dim: Width inside.
        depth: Pairs of a block over time and a round over tracks.
        num_heads: Of each block.
        num_virtual_tracks: Learned tracks through which the others exchange.
    """

    def __init__(
        self,
        input_dim: int = 388,
        output_dim: int = 130,
        hidden_dim: int = 384,
        depth: int = 6,
        num_heads: int = 8,
        num_virtual_tracks: int = 64,
    ) -> None:
        super().__init__()
        # The spelling is the release's.
        self.virual_tracks = nn.Parameter(torch.randn(1, num_virtual_tracks, 1, hidden_dim))
        self.input_norm = nn.LayerNorm(input_dim)
        self.input_transform = Linear(input_dim, hidden_dim)
        self.output_norm = nn.LayerNorm(hidden_dim)
        self.flow_head = Linear(hidden_dim, output_dim)

        def blocks(is_cross: bool = False) -> nn.ModuleList:
            return nn.ModuleList(TrackAttention(hidden_dim, num_heads, is_cross=is_cross) for _ in range(depth))

        self.time_blocks = blocks()
        self.space_virtual_blocks = blocks()
        self.space_point2virtual_blocks = blocks(is_cross=True)
        self.space_virtual2point_blocks = blocks(is_cross=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier, and almost no change at the start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.flow_head.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, V, input_dim] -> [B, N, V, output_dim]."""
        batch, num_tracks = x.shape[:2]
        start = self.input_transform(self.input_norm(x))
        virtual = self.virual_tracks.expand(batch, -1, x.shape[2], -1)
        tokens = torch.cat([start, virtual], dim=1)
        for i in range(len(self.time_blocks)):
            tokens = self._over_time(i, tokens)
            tokens = self._over_tracks(i, tokens, num_tracks)
        return self.flow_head(self.output_norm(tokens[:, :num_tracks] + start))

    def _over_time(self, i: int, tokens: Tensor) -> Tensor:
        tracks = rearrange(tokens, "b n v c -> (b n) v c")
        return rearrange(self.time_blocks[i](tracks), "(b n) v c -> b n v c", b=tokens.shape[0])

    def _over_tracks(self, i: int, tokens: Tensor, num_tracks: int) -> Tensor:
        frames = rearrange(tokens, "b n v c -> (b v) n c")
        points, virtual = frames[:, :num_tracks], frames[:, num_tracks:]
        virtual = self.space_virtual2point_blocks[i](virtual, points)
        virtual = self.space_virtual_blocks[i](virtual)
        points = self.space_point2virtual_blocks[i](points, virtual)
        return rearrange(torch.cat([points, virtual], dim=1), "(b v) n c -> b n v c", b=tokens.shape[0])
