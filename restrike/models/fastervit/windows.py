"""How tokens move between an image, its windows, and the grid of carrier tokens.

w: window side; a x b: windows of a feature map (rows x columns); c: side of a window's own square of carriers.
Carriers come in two orders: window-major (window by window, row-major inside) and raster (row-major over the whole
a*c x b*c grid).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from restrike.models.fastervit.positions import Grid


def to_windows(x: Tensor, side: int) -> Tensor:
    """[B, H, W, C] -> [B * a * b, side^2, C]; H and W must be multiples of `side`."""
    return rearrange(x, "B (a i) (b j) C -> (B a b) (i j) C", i=side, j=side)


def from_windows(windows: Tensor, grid: Grid, side: int) -> Tensor:
    """[B * a * b, side^2, C] -> [B, a * side, b * side, C]; `grid` is (a, b)."""
    a, b = grid
    return rearrange(windows, "(B a b) (i j) C -> B (a i) (b j) C", a=a, b=b, i=side, j=side)


def carriers_to_raster(carriers: Tensor, grid: Grid, side: int) -> Tensor:
    """[B, T, C] window-major -> raster, for `grid` = (a, b) windows with `side`^2 carriers each."""
    a, b = grid
    return rearrange(carriers, "B (a b i j) C -> B (a i b j) C", a=a, b=b, i=side, j=side)


def carriers_to_windows(carriers: Tensor, grid: Grid, side: int, as_released: bool) -> Tensor:
    """[B, T, C] raster -> window-major.

    as_released: undo `carriers_to_raster` as the release does, which for a != b reads the raster with a and c in each
        other's place and so deals carriers out to other windows.
    """
    a, b = grid
    if as_released:
        return rearrange(carriers, "B (b i a j) C -> B (b a i j) C", a=a, b=b, i=side, j=side)
    return rearrange(carriers, "B (a i b j) C -> B (a b i j) C", a=a, b=b, i=side, j=side)


def upsample_carriers(carriers: Tensor, carrier_side: int, window_side: int) -> Tensor:
    """Nearest-neighbour growth of each window's carriers, [.., c^2, C] -> [.., w^2, C]: source floor(i * c / w)."""
    source = torch.arange(window_side, device=carriers.device) * carrier_side // window_side
    index = (source[:, None] * carrier_side + source[None, :]).flatten()
    return carriers.index_select(-2, index)


class _CarrierPool(nn.Module):
    """Second name under which released files list the tokenizer's convolution; computes nothing itself."""

    def __init__(self, pos: nn.Conv2d) -> None:
        super().__init__()
        self.pos = pos


class GlobalTokenizer(nn.Module):
    """Initial carrier tokens: a depthwise convolution, then average pooling to c x c values a window (paper eq. 4)."""

    def __init__(self, dim: int, window_size: int, carrier_size: int) -> None:
        super().__init__()
        self.window_size, self.carrier_size = window_size, carrier_size
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.to_global_feature = _CarrierPool(self.pos_embed)
        self.register_load_state_dict_pre_hook(_complete_alias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], H and W multiples of the window -> [B, T, C] window-major."""
        pooled = self.pos_embed(x)
        kernels, strides = zip(*(self._pooling(size) for size in x.shape[-2:]), strict=True)
        pooled = F.avg_pool2d(pooled, kernels, strides)
        side = self.carrier_size
        return rearrange(pooled, "B C (a i) (b j) -> B (a b i j) C", i=side, j=side)

    def _pooling(self, size: int) -> tuple[int, int]:
        """Kernel and stride along one axis; neighbouring kernels overlap."""
        out = size // self.window_size * self.carrier_size
        stride = size // out
        return size - (out - 1) * stride, stride


def _complete_alias(module: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    """Accept a file that has the convolution under only one of its two names."""
    first, second = f"{prefix}pos_embed.", f"{prefix}to_global_feature.pos."
    for one, other in ((first, second), (second, first)):
        for name in ("weight", "bias"):
            if one + name in state_dict:
                state_dict.setdefault(other + name, state_dict[one + name])
