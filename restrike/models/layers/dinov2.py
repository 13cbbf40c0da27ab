"""DINOv2's vision transformer (arXiv 2304.07193), with or without register tokens (arXiv 2309.16588).

Parameter names are the public releases'. Registers go between class and patch tokens after the position table was
added, so they have no position. `mask_token` serves DINOv2's own pre-training only; it is kept because checkpoints
hold it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from restrike.models.layers.block import Block, Checkpointing, run
from restrike.models.layers.patch_embed import PatchEmbed, patch_grid
from restrike.models.layers.position import resample_positions

# name -> width, depth, heads
DINOV2_SIZES = {
    "vits14": (384, 12, 6),
    "vitb14": (768, 12, 12),
    "vitl14": (1024, 24, 16),
    "vitg2": (1536, 40, 24),
}


class DinoVisionTransformer(nn.Module):
    """Patch tokens of images.

    Args:
        img_size: Side of the square images that the position table was trained for.
        patch_size: Side of a patch.
        embed_dim: Width.
        depth: Blocks.
        num_heads: Heads of each block.
        mlp_ratio: Hidden width of the MLPs over `embed_dim`.
        num_register_tokens: 0 or 4 in the releases.
        init_values: Start of the layer scales.
        antialias: How other image sizes resample the position table; see `resample_positions`.
        interpolate_offset: Likewise; 0.1 in models without registers.
        grad_checkpointing: In training, compute each block's activations again in the backward pass; "selective" keeps
            the results of products.
    """

    def __init__(
        self,
        img_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_register_tokens: int = 4,
        init_values: float = 1.0,
        antialias: bool = True,
        interpolate_offset: float = 0.0,
        grad_checkpointing: Checkpointing = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.embed_dim, self.num_register_tokens = patch_size, embed_dim, num_register_tokens
        self.antialias, self.interpolate_offset = antialias, interpolate_offset
        self.grad_checkpointing: Checkpointing = grad_checkpointing
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim), requires_grad=False)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, init_values=init_values, norm_eps=1e-6) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """DINOv2's own start; blocks, norms and layer scales reset themselves."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.num_register_tokens:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens."""
        return 1 + self.num_register_tokens

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> patch tokens [B, H/p · W/p, embed_dim], row-major, after the last norm."""
        return self.forward_features(images)[0][:, self.num_prefix_tokens :]

    def forward_features(self, images: Tensor, taps: Collection[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """All tokens after the last norm, [B, prefix + patches, embed_dim], and raw outputs of the blocks in `taps`."""
        x, intermediates = self.embed(images), []
        for i, block in enumerate(self.blocks):
            x = run(block, x, grad_checkpointing=self.grad_checkpointing)
            if i in taps:
                intermediates.append(x)
        return self.norm(x), intermediates

    def embed(self, images: Tensor) -> Tensor:
        """Tokens before the first block, [B, class + registers + patches, embed_dim]."""
        grid, batch = patch_grid(images, self.patch_size), images.shape[0]
        x = torch.cat([self.cls_token.expand(batch, -1, -1), self.patch_embed(images)], dim=1)
        x = x + resample_positions(self.pos_embed, grid, antialias=self.antialias, offset=self.interpolate_offset).to(
            x.dtype
        )
        if not self.num_register_tokens:
            return x
        return torch.cat([x[:, :1], self.register_tokens.expand(batch, -1, -1), x[:, 1:]], dim=1)
