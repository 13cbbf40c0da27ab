"""Images to tokens: one convolution whose stride is its size."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """[B, in_chans, H, W] -> [B, H/p · W/p, embed_dim], row-major; no norm."""

    def __init__(self, patch_size: int, embed_dim: int, in_chans: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT


def patch_grid(images: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in images [..., H, W].

    Raises:
        ValueError: a side is no multiple of `patch_size`.
    """
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        down = height // patch_size * patch_size, width // patch_size * patch_size
        raise ValueError(
            f"images: expected sides that are multiples of {patch_size}, got {height}x{width}; "
            f"crop or resize them, for instance to {down[0]}x{down[1]}"
        )
    return height // patch_size, width // patch_size
