"""The dense variant's DPT decoder (arXiv 2505.05473; DPT, arXiv 2103.13413), conditioned on the diffusion time.

Its two fine maps come from the image encoder, so all that happens to them before they meet the coarse ones depends on
the images alone: `image_skips` computes it once a scene, and every step of a sampler reuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restrike.models.diffusionsfm.embeddings import TimestepEmbedder
from restrike.models.diffusionsfm.upsampled_conv import conv_of_upsampled
from restrike.models.layers.dpt import FusionDecoder, ResidualConvUnit, resize_bilinear
from restrike.models.layers.linear import Linear

_IMAGE_FACTORS = (8, 4)  # nearest upsampling of the encoder's two maps
_RAY_FACTORS = (2, 1)  # and of the transformer's


class TimedConvUnit(ResidualConvUnit):
    """gate · branch(y) + y with y = x (1 + scale) + shift, all three from the diffusion time."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.t_embedder = TimestepEmbedder(features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(features, 3 * features))

    def modulation(self, timesteps: Tensor) -> Tensor:
        """Times [T] -> [T, 3 features]."""
        return self.adaLN_modulation(self.t_embedder(timesteps))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:  # type: ignore[override]
        """[B, features, h, w] under [B or 1, 3 features]."""
        shift, scale, gate = modulation[..., None, None].chunk(3, dim=1)
        x = x * (1 + scale) + shift
        return gate * self.branch(F.relu(x)) + x


class RayDecoder(FusionDecoder):
    """Two maps of the images and two of the rays, each on the patch grid, to rays at 16 times its size.

    Args:
        image_dim: Channels of the images' maps.
        ray_dim: Channels of the rays' maps.
        features: Channels inside.
        embed_dim: Channels of the ray embedding.
        in_channels: Of the noisy rays and their mask.
        out_channels: Of the rays.
        patch_size: Pixels of rays per patch side.
    """

    def __init__(
        self,
        image_dim: int,
        ray_dim: int,
        features: int = 256,
        embed_dim: int = 384,
        in_channels: int = 9,
        out_channels: int = 8,
        patch_size: int = 16,
    ) -> None:
        channels = (image_dim, image_dim, ray_dim, ray_dim)
        super().__init__(channels, features, has_unused_unit=True, unit2=TimedConvUnit)
        self.input_conv = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self.output_conv = nn.Sequential(
            nn.Conv2d(features, features // 2, kernel_size=3, padding=1),
            nn.LeakyReLU(),
            nn.Conv2d(features // 2, 32, kernel_size=3, padding=1),
            nn.LeakyReLU(),
            nn.Conv2d(32, out_channels, kernel_size=1),
        )
        self.reset_parameters()
        # Only checkpoints hold it; DDP would wait for its gradient.
        self.get_submodule("refinenet4.resConfUnit1").requires_grad_(False)

    def reset_parameters(self) -> None:
        """Kaiming-uniform in the fusion steps' convolutions; the rest keeps torch's own start."""
        for i in range(1, 5):
            for module in self.get_submodule(f"refinenet{i}").modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_uniform_(module.weight)

    def _part(self, name: str) -> Any:
        return self.get_submodule(name)

    def modulations(self, timesteps: Tensor) -> list[Tensor]:
        """[T, 3 features] of refinenet1 … refinenet4, of times [T]."""
        return [self._part(f"refinenet{i}.resConfUnit2").modulation(timesteps) for i in range(1, 5)]

    def image_skips(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """What the two finest levels add: [B, F, 8h, 8w] and [B, F, 4h, 4w], of maps [B, image_dim, h, w]."""
        levels = [self.level(i, x, f) for i, x, f in zip((1, 2), maps, _IMAGE_FACTORS, strict=True)]
        return [self._part(f"refinenet{i}.resConfUnit1")(x) for i, x in zip((1, 2), levels, strict=True)]

    def level(self, i: int, x: Tensor, factor: int) -> Tensor:
        """`layer<i>_rn` of a map upsampled by `factor`."""
        return conv_of_upsampled(x, self._part(f"layer{i}_rn").weight, factor)

    def stages(
        self, skips: Sequence[Tensor], maps: Sequence[Tensor], modulations: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Outputs of refinenet4 … refinenet1; each twice as large as its input."""
        level3, level4 = (self.level(i, x, f) for i, x, f in zip((3, 4), maps, _RAY_FACTORS, strict=True))
        added = [*skips, self._part("refinenet3.resConfUnit1")(level3), None]
        x = level4
        for i in (4, 3, 2, 1):
            step, skip = self._part(f"refinenet{i}"), added[i - 1]
            x = step.resConfUnit2(x if skip is None else x + skip, modulations[i - 1])
            # The 1x1 convolution commutes with the resize; before it, it costs a quarter. float32, as published.
            x = resize_bilinear(step.out_conv(x).float(), (2 * x.shape[-2], 2 * x.shape[-1]))
            yield x

    def forward(self, skips: Sequence[Tensor], maps: Sequence[Tensor], modulations: Sequence[Tensor]) -> Tensor:
        """[B, out_channels, 16h, 16w].

        Args:
            skips: From `image_skips`.
            maps: The rays' two maps, [B, ray_dim, h, w].
            modulations: From `modulations`, each [B or 1, 3 features].
        """
        *_, finest = self.stages(skips, maps, modulations)
        return self.output_conv(finest)


class ImageProjection(nn.Module):
    """Each patch token, with the class token beside it: Linear, exact GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Sequential(Linear(2 * dim, dim), nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, 1 + N, dim], class token first -> [B, N, dim]."""
        patches = tokens[:, 1:]
        return self.project(torch.cat([patches, tokens[:, :1].expand_as(patches)], dim=-1))
