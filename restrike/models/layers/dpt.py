"""Convolutional decoder of DPT (arXiv 2103.13413): four token maps to one fine feature map.

Names are those of the released checkpoints (`scratch.layer1_rn`, `scratch.refinenet1`, …). Two things differ between
releases and show in every output: VGGT's residual units add the *rectified* input (`rectify_skip`), and maps whose
size is no power of two apart are either resized to the next finer map's size (VGGT) or doubled and cropped (CUT3R).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def resize_bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] to `size`, corner pixels aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def reassemble_layers(channels: Sequence[int]) -> nn.ModuleList:
    """Layers that bring the four maps from the patch grid to 4, 2, 1 and 1/2 times its size."""
    return nn.ModuleList(
        [
            nn.ConvTranspose2d(channels[0], channels[0], kernel_size=4, stride=4),
            nn.ConvTranspose2d(channels[1], channels[1], kernel_size=2, stride=2),
            nn.Identity(),
            nn.Conv2d(channels[3], channels[3], kernel_size=3, stride=2, padding=1),
        ]
    )


class ResidualConvUnit(nn.Module):
    """conv2(relu(conv1(relu(x)))) plus x, or plus relu(x) with `rectify_skip`.

    A subclass that is conditioned (on a diffusion time, say) takes the condition as second argument of forward.
    """

    def __init__(self, features: int, rectify_skip: bool = False) -> None:
        super().__init__()
        self.rectify_skip = rectify_skip
        self.conv1 = nn.Conv2d(features, features, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(features, features, kernel_size=3, padding=1)

    def branch(self, rectified: Tensor) -> Tensor:
        """The unit without its skip; its argument is relu(x)."""
        return self.conv2(F.relu(self.conv1(rectified)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, features, h, w] -> the same."""
        rectified = F.relu(x)
        return self.branch(rectified) + (rectified if self.rectify_skip else x)


class FeatureFusion(nn.Module):
    """One step from coarse to fine: y = x + unit1(skip); y = unit2(y); 1x1 convolution; bilinear resize.

    The convolution comes before the resize, which gives the same numbers for a quarter of the work.

    Args:
        features: Channels.
        unit1: For the skip; None has no parameters and takes no skip.
        unit2: For the sum.
    """

    def __init__(self, features: int, unit1: nn.Module | None, unit2: nn.Module) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, kernel_size=1)
        if unit1 is not None:
            self.resConfUnit1 = unit1
        self.resConfUnit2 = unit2

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        size: tuple[int, int] | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """[B, features, h, w] -> [B, features, *size]; twice the size where none is given."""
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = self.resConfUnit2(x) if condition is None else self.resConfUnit2(x, condition)
        return resize_bilinear(self.out_conv(x), size or (2 * x.shape[-2], 2 * x.shape[-1]))


class FusionDecoder(nn.Module):
    """The four maps, brought to `features` channels and fused from the coarsest to the finest.

    Args:
        channels: Of the four maps, finest first.
        features: Channels inside.
        rectify_skip: See `ResidualConvUnit`.
        fit_sizes: Resize to exactly the next finer map's size; else double, and crop where the finer map is odd.
        has_unused_unit: Keep the coarsest level's first unit, which nothing reads but some checkpoints hold.
        unit2: Class of the units that see the sums, called with `features`; None takes `ResidualConvUnit`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        features: int,
        rectify_skip: bool = False,
        fit_sizes: bool = True,
        has_unused_unit: bool = False,
        unit2: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.fit_sizes = fit_sizes

        def unit() -> nn.Module:
            return ResidualConvUnit(features, rectify_skip)

        for i, width in enumerate(channels, 1):
            self.add_module(f"layer{i}_rn", nn.Conv2d(width, features, kernel_size=3, padding=1, bias=False))
        for i in range(1, 5):
            first = unit() if i < 4 or has_unused_unit else None
            self.add_module(f"refinenet{i}", FeatureFusion(features, first, unit2(features) if unit2 else unit()))

    def fuse(self, maps: Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        """Maps [B, channels[i], h_i, w_i], finest first -> [B, features, 2 h_0, 2 w_0]."""
        levels = [self.get_submodule(f"layer{i}_rn")(x) for i, x in enumerate(maps, 1)]
        fused = self.get_submodule("refinenet4")(levels[3], None, self._size(levels, 3), condition)
        for i in (2, 1, 0):
            height, width = levels[i].shape[-2:]
            step = self.get_submodule(f"refinenet{i + 1}")
            fused = step(fused[..., :height, :width], levels[i], self._size(levels, i), condition)
        return fused

    def _size(self, levels: Sequence[Tensor], i: int) -> tuple[int, int] | None:
        if not self.fit_sizes or i == 0:
            return None
        height, width = levels[i - 1].shape[-2:]
        return height, width
