"""VGGT's backbone: blocks that attend within each frame and across all frames, in turn (arXiv 2503.11651, section 3.2).

What differs from a plain ViT: patch tokens come from a whole DINOv2; the first frame of a scene has special tokens of
its own, all others share theirs, so the order of the other frames does not matter; rotary positions know the place in
the frame but not the frame.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from einops import rearrange
from torch import Tensor, nn

from restrike.models.layers.block import Block, Checkpointing, check_checkpointing, run
from restrike.models.layers.dinov2 import DINOV2_SIZES, DinoVisionTransformer
from restrike.models.layers.patch_embed import PatchEmbed, patch_grid
from restrike.models.layers.rotary import RotaryTable, grid_positions, rotary_table

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class Aggregator(nn.Module):
    """Images to tokens of every layer.

    Args:
        img_size: Side that DINOv2's position table was trained for.
        patch_size: Side of a patch.
        embed_dim: Width C.
        depth: Pairs of a frame block and a global block.
        num_heads: Of each block.
        mlp_ratio: Hidden width of the MLPs over C.
        num_register_tokens: Special tokens of each frame beside the camera token.
        qk_norm: LayerNorm on queries and keys.
        rope_base: Base of the rotary frequencies.
        init_values: Start of the layer scales.
        patch_embed: Name of the embedder, one of `PATCH_EMBEDS`.
        patch_embed_depth: Blocks of DINOv2; None takes the name's.
        patch_embed_num_heads: Heads of DINOv2; None takes the name's.
        grad_checkpointing: See `VGGT`.
    """

    _resnet_mean: Tensor
    _resnet_std: Tensor

    def __init__(
        self,
        img_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_register_tokens: int = 4,
        qk_norm: bool = True,
        rope_base: float = 100.0,
        init_values: float = 0.01,
        patch_embed: str = "dinov2_vitl14_reg",
        patch_embed_depth: int | None = None,
        patch_embed_num_heads: int | None = None,
        grad_checkpointing: Checkpointing = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.depth = patch_size, depth
        self.head_dim, self.rope_base = embed_dim // num_heads, rope_base
        self.num_special_tokens = 1 + num_register_tokens
        self.camera_token = nn.Parameter(1e-6 * torch.randn(1, 2, 1, embed_dim))
        self.register_token = nn.Parameter(1e-6 * torch.randn(1, 2, num_register_tokens, embed_dim))
        self.patch_embed = _patch_embedder(
            patch_embed, embed_dim, patch_size, img_size, mlp_ratio, patch_embed_depth, patch_embed_num_heads
        )

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(
                Block(embed_dim, num_heads, mlp_ratio, qk_norm=qk_norm, init_values=init_values) for _ in range(depth)
            )

        self.frame_blocks, self.global_blocks = blocks(), blocks()
        # Names of the release, whose files do not hold them.
        self.register_buffer("_resnet_mean", torch.tensor(_MEAN).view(1, 1, 3, 1, 1), persistent=False)
        self.register_buffer("_resnet_std", torch.tensor(_STD).view(1, 1, 3, 1, 1), persistent=False)
        self.set_grad_checkpointing(grad_checkpointing)

    def set_grad_checkpointing(self, enable: Checkpointing = True) -> None:
        """See `grad_checkpointing`; an embedder that has blocks follows."""
        check_checkpointing(enable)
        self.grad_checkpointing = enable
        if isinstance(self.patch_embed, DinoVisionTransformer):
            self.patch_embed.grad_checkpointing = enable

    def forward(self, images: Tensor, layers: Collection[int] | None = None) -> dict[int, Tensor]:
        """Tokens of the wanted layers; layers after the last of them are not run.

        Args:
            images: [B, V, 3, H, W] in [0, 1], sides multiples of `patch_size`.
            layers: Indices from 0; None keeps all of them, which at full size takes 167 MiB a 336x518 frame.

        Returns:
            Layer to [B, V, 1 + registers + H/p · W/p, 2 C]: camera, registers, patches row-major; the frame block's
            output, then the global block's.
        """
        wanted = sorted(range(self.depth) if layers is None else set(layers))
        tokens, num_views = self.embed(images), images.shape[1]
        table = self._rotary(patch_grid(images, self.patch_size), images.device)
        tables = table, table.repeat(num_views)
        kept = {}
        for i in range(wanted[-1] + 1):
            in_frame = self._run(self.frame_blocks[i], tokens, tables[0])
            joined = rearrange(in_frame, "(b v) n c -> b (v n) c", v=num_views)
            across = self._run(self.global_blocks[i], joined, tables[1])
            tokens = rearrange(across, "b (v n) c -> (b v) n c", v=num_views)
            if i in wanted:
                kept[i] = torch.cat([in_frame, tokens], dim=-1).unflatten(0, (-1, num_views))
        return kept

    def embed(self, images: Tensor) -> Tensor:
        """Tokens before the first block, [B · V, 1 + registers + patches, C]."""
        batch, views = images.shape[:2]
        patches = self.patch_embed(((images - self._resnet_mean) / self._resnet_std).flatten(0, 1))
        special = torch.cat([self.camera_token, self.register_token], dim=2)
        of_first, of_others = (special[:, i : i + 1].expand(batch, n, -1, -1) for i, n in ((0, 1), (1, views - 1)))
        return torch.cat([torch.cat([of_first, of_others], dim=1).flatten(0, 1), patches], dim=1)

    def _rotary(self, grid: tuple[int, int], device: torch.device) -> RotaryTable:
        """Positions of patches start at (1, 1); special tokens lie at (0, 0), so they are not turned."""
        patches = grid_positions(*grid, offset=1, device=device)
        positions = torch.cat([patches.new_zeros(self.num_special_tokens, 2), patches])
        return rotary_table(positions, self.head_dim, self.rope_base)

    def _run(self, block: nn.Module, tokens: Tensor, table: RotaryTable) -> Tensor:
        return run(block, tokens, table, grad_checkpointing=self.grad_checkpointing)


PATCH_EMBEDS = ("conv", *(f"dinov2_{size}_reg" for size in DINOV2_SIZES))


def _patch_embedder(
    name: str, embed_dim: int, patch_size: int, img_size: int, mlp_ratio: float, depth: int | None, heads: int | None
) -> nn.Module:
    if name == "conv":
        return PatchEmbed(patch_size, embed_dim)
    if name not in PATCH_EMBEDS:
        raise ValueError(f"patch_embed: expected one of {', '.join(PATCH_EMBEDS)}, got {name!r}")
    width, default_depth, default_heads = DINOV2_SIZES[name.removeprefix("dinov2_").removesuffix("_reg")]
    if embed_dim != width and depth is None:
        raise ValueError(
            f"patch_embed {name!r} has width {width}, embed_dim is {embed_dim}; choose the embedder of that width, or "
            "give patch_embed_depth and patch_embed_num_heads for one of your own size"
        )
    return DinoVisionTransformer(
        img_size, patch_size, embed_dim, depth or default_depth, heads or default_heads, mlp_ratio
    )
