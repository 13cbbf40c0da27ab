"""Dense maps from tokens of four layers (arXiv 2503.11651, section 3.3): depth, points, features for tracking.

Differs from DPT in a sinusoidal map of positions that is added to the projected tokens and to the full-size features,
in a norm shared by all layers, and in residual units whose skip is rectified.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from restrike.models.layers.block import Checkpointing, run_checkpointed
from restrike.models.layers.dpt import FusionDecoder, reassemble_layers, resize_bilinear
from restrike.models.vggt.activations import (
    Activation,
    ConfidenceActivation,
    activate,
    activate_confidence,
    check_activation,
)

_POSITION_WEIGHT = 0.1
_POSITION_BASE = 100.0


class Scratch(FusionDecoder):
    """The decoder and the convolutions that follow it, together under one name as in the release."""

    output_conv1: nn.Module
    output_conv2: nn.Module


class DPTFeatures(nn.Module):
    """Tokens of four layers to one map of features.

    Args:
        dim: Width of the tokens (2 C).
        patch_size: Side of a patch.
        features: Channels of the decoder.
        out_channels: Channels of the four projected layers.
        down_ratio: The map has 1/down_ratio of the image's sides.
        has_positions: Add the map of positions.
        frames_per_chunk: Frames that go through at a time; bounds memory, changes no number.
        grad_checkpointing: In training, compute each chunk's activations again in the backward pass; "selective" keeps
            the results of convolutions.
        output_features: Channels of the map; None takes `features`.
    """

    def __init__(
        self,
        dim: int = 2048,
        patch_size: int = 14,
        features: int = 256,
        out_channels: Sequence[int] = (256, 512, 1024, 1024),
        down_ratio: int = 1,
        has_positions: bool = True,
        frames_per_chunk: int = 8,
        grad_checkpointing: Checkpointing = False,
        output_features: int | None = None,
    ) -> None:
        super().__init__()
        self.patch_size, self.down_ratio, self.has_positions = patch_size, down_ratio, has_positions
        self.frames_per_chunk = frames_per_chunk
        self.grad_checkpointing: Checkpointing = grad_checkpointing
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, width, kernel_size=1) for width in out_channels)
        self.resize_layers = reassemble_layers(out_channels)
        self.scratch = Scratch(out_channels, features, rectify_skip=True)
        self.scratch.output_conv1 = nn.Conv2d(features, output_features or features, kernel_size=3, padding=1)

    def forward(self, patch_tokens: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """Features of all frames.

        Args:
            patch_tokens: Four times [B, V, H/p · W/p, dim], row-major, without special tokens.
            image_size: (H, W).

        Returns:
            [B, V, channels, H / down_ratio, W / down_ratio].
        """
        lead = patch_tokens[0].shape[:2]
        chunks = zip(*(tokens.flatten(0, 1).split(self.frames_per_chunk) for tokens in patch_tokens), strict=True)
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            maps = [run_checkpointed(self._decode, chunk, image_size, mode=self.grad_checkpointing) for chunk in chunks]
        else:
            maps = [self._decode(chunk, image_size) for chunk in chunks]
        return torch.cat(maps).unflatten(0, lead)

    def _decode(self, patch_tokens: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """Four times [F, H/p · W/p, dim] -> [F, channels, H / down_ratio, W / down_ratio]."""
        height, width = image_size
        grid = height // self.patch_size, width // self.patch_size
        maps = []
        for tokens, project, resize in zip(patch_tokens, self.projects, self.resize_layers, strict=True):
            x = project(self.norm(tokens).mT.unflatten(-1, grid))
            maps.append(resize(self._add_positions(x, image_size)))
        x = self.scratch.output_conv1(self.scratch.fuse(maps))
        x = resize_bilinear(x, (height // self.down_ratio, width // self.down_ratio))
        return self._add_positions(x, image_size)

    def _add_positions(self, x: Tensor, image_size: tuple[int, int]) -> Tensor:
        if not self.has_positions:
            return x
        size = x.shape[-2], x.shape[-1]
        return x + _POSITION_WEIGHT * position_map(size, image_size, x.shape[1], x.device).to(x.dtype)


class DPTHead(DPTFeatures):
    """Tokens of four layers to a value per pixel and its confidence.

    Args:
        output_dim: Channels of the value and one of the confidence.
        activation: Of the value.
        confidence_activation: Of the confidence.
        arguments: Those of `DPTFeatures`.
    """

    def __init__(
        self,
        output_dim: int,
        activation: Activation,
        confidence_activation: ConfidenceActivation = "expp1",
        features: int = 256,
        **arguments: object,
    ) -> None:
        check_activation("activation", activation, Activation)
        check_activation("confidence_activation", confidence_activation, ConfidenceActivation)
        super().__init__(features=features, output_features=features // 2, **arguments)  # type: ignore[arg-type]
        self.activation, self.confidence_activation = activation, confidence_activation
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, kernel_size=3, padding=1), nn.ReLU(), nn.Conv2d(32, output_dim, kernel_size=1)
        )

    def forward(self, patch_tokens: Sequence[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """As `DPTFeatures`, but values [B, V, H, W, output_dim - 1] and confidence [B, V, H, W]."""
        raw = super().forward(patch_tokens, image_size).movedim(2, -1)
        return activate(raw[..., :-1], self.activation), activate_confidence(raw[..., -1], self.confidence_activation)

    def _decode(self, patch_tokens: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        return self.scratch.output_conv2(super()._decode(patch_tokens, image_size))


def position_coordinates(
    size: tuple[int, int], image_size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Columns u [w] and rows v [h] of a map, in float64: the image's diagonal is 2 long, its centre 0."""
    aspect = image_size[1] / image_size[0]
    diagonal = (aspect**2 + 1) ** 0.5

    def axis(count: int, span: float) -> Tensor:
        end = span * (count - 1) / count
        return torch.linspace(-end, end, count, dtype=torch.float64, device=device)

    return axis(size[1], aspect / diagonal), axis(size[0], 1 / diagonal)


def position_map(size: tuple[int, int], image_size: tuple[int, int], channels: int, device: torch.device) -> Tensor:
    """Sines and cosines of columns, then of rows, float32 [channels, h, w].

    Separable, so only h + w rows of channels are computed; a cache would save nothing.
    """
    frequency = torch.arange(channels // 4, dtype=torch.float64, device=device) / (channels / 4)
    omega = _POSITION_BASE**-frequency
    angles = [omega[:, None] * axis for axis in position_coordinates(size, image_size, device)]
    of_columns, of_rows = (torch.cat([a.sin(), a.cos()]).float() for a in angles)
    half = channels // 2
    return torch.cat([of_columns[:, None, :].expand(half, *size), of_rows[:, :, None].expand(half, *size)])
