"""From a view's tokens to its points in two frames, its colours and its pose.

Points in the first view's camera are regressed from tokens that the pose token has modulated; they are not composed
from the pose and the points in the view's own camera. Dense parts run in float32 whatever autocast says.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restrike.models.cut3r.activations import activate_colors, activate_points, activate_pose
from restrike.models.cut3r.blocks import ModulatedBlock
from restrike.models.layers.dpt import FusionDecoder, reassemble_layers
from restrike.models.layers.mlp import Mlp
from restrike.models.layers.precision import no_autocast
from restrike.models.layers.rotary import RotaryTable

_NUM_TRANSFORM_BLOCKS = 2
_POINT_CHANNELS, _COLOR_CHANNELS = 4, 3


class Tokens(NamedTuple):
    """What heads see of F frames.

    Attributes:
        encoded: [F, N, enc_dim], the encoder's tokens.
        early: [F, N, dim], after half of the decoder's layers.
        late: [F, N, dim], after three quarters.
        last: [F, 1 + N, dim], after its norm; the first one is the pose token.
    """

    encoded: Tensor
    early: Tensor
    late: Tensor
    last: Tensor


class Predictions(NamedTuple):
    """Of each view; leading dimensions are [B, V], or [B] in a stream.

    Attributes:
        points_camera: [..., H, W, 3], in the view's own camera (OpenCV axes).
        confidence_camera: [..., H, W] ≥ 1.
        points_world: [..., H, W, 3], in the first view's camera.
        confidence_world: [..., H, W] ≥ 1.
        colors: [..., H, W, 3] in (-1, 1).
        poses: [..., 7], camera to first view; see `restrike.geometry.decode_pose`.
    """

    points_camera: Tensor
    confidence_camera: Tensor
    points_world: Tensor
    confidence_world: Tensor
    colors: Tensor
    poses: Tensor


class PoseHead(nn.Module):
    """Pose token to pose."""

    def __init__(self, dim: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.mlp = Mlp(dim, int(dim * mlp_ratio), out_dim=7)

    def forward(self, token: Tensor) -> Tensor:
        """[F, dim] -> [F, 7]."""
        return activate_pose(self.mlp(token))


class Head(nn.Module):
    """What both heads share; a subclass turns tokens into raw maps.

    Args:
        dim: Width of the decoder.
        num_heads: Of the modulated blocks.
        patch_size: Side of a patch.
        faces_forward: See `activate_points`; for points in the view's own camera.
    """

    pose_head: PoseHead
    final_transform: nn.ModuleList

    def __init__(self, dim: int, num_heads: int, patch_size: int, faces_forward: bool) -> None:
        super().__init__()
        self.dim, self.num_heads, self.patch_size, self.faces_forward = dim, num_heads, patch_size, faces_forward

    def forward(self, tokens: Tokens, image_size: tuple[int, int], rotary: RotaryTable) -> Predictions:
        """Predictions [F, ...] of F frames; `rotary` is the table of the N patches for the modulated blocks."""
        pose_token, own = tokens.last[:, 0], tokens.last[:, 1:]
        shared = own
        for block in self.final_transform:
            shared = block(shared, pose_token, rotary)
        with no_autocast(own.device):
            maps = self._raw_maps(tokens._replace(last=own), shared.to(own.dtype), image_size)
            points, confidence = activate_points(maps[0], self.faces_forward)
            shared_points, shared_confidence = activate_points(maps[1])
            return Predictions(
                points,
                confidence,
                shared_points,
                shared_confidence,
                activate_colors(maps[2]),
                self.pose_head(pose_token),
            )

    @abstractmethod
    def _raw_maps(self, tokens: Tokens, shared: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Own points, points in the first view, colours: [F, 4, H, W] twice and [F, 3, H, W]."""

    def _add_shared_parts(self, has_pose: bool) -> None:
        """Registered in the released order, which differs between the heads."""
        if has_pose:
            self.pose_head = PoseHead(self.dim)
        self.final_transform = nn.ModuleList(
            ModulatedBlock(self.dim, self.num_heads) for _ in range(_NUM_TRANSFORM_BLOCKS)
        )


class LinearHead(Head):
    """Each map by one MLP a patch."""

    def __init__(self, enc_dim: int, dim: int, num_heads: int, patch_size: int) -> None:
        super().__init__(dim, num_heads, patch_size, faces_forward=True)
        self.proj = self._mlp(_POINT_CHANNELS)
        self.rgb_proj = self._mlp(_COLOR_CHANNELS)
        self._add_shared_parts(has_pose=True)
        self.cross_proj = self._mlp(_POINT_CHANNELS)

    def _mlp(self, channels: int) -> Mlp:
        return Mlp(self.dim, 4 * self.dim, out_dim=channels * self.patch_size**2)

    def _raw_maps(self, tokens: Tokens, shared: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        grid = image_size[0] // self.patch_size, image_size[1] // self.patch_size

        def unfold(x: Tensor) -> Tensor:
            return F.pixel_shuffle(x.mT.unflatten(-1, grid), self.patch_size)

        return unfold(self.proj(tokens.last)), unfold(self.cross_proj(shared)), unfold(self.rgb_proj(tokens.last))


class Scratch(FusionDecoder):
    """The decoder under the released names: its four first layers have two of them each."""

    def __init__(self, channels: Sequence[int], features: int) -> None:
        super().__init__(channels, features, fit_sizes=False, has_unused_unit=True)
        self.layer_rn = nn.ModuleList(self.get_submodule(f"layer{i}_rn") for i in range(1, 5))
        for i in range(1, 5):  # behind layer_rn, as in the released order
            self._modules[f"refinenet{i}"] = self._modules.pop(f"refinenet{i}")


class DPTMap(nn.Module):
    """Tokens of four layers to one raw map.

    Args:
        widths: Of the tokens, encoder first.
        channels: Of the map.
        features: Channels inside.
        out_channels: Channels of the four projections.
    """

    def __init__(self, widths: Sequence[int], channels: int, features: int, out_channels: Sequence[int]) -> None:
        super().__init__()
        self.scratch = Scratch(out_channels, features)
        half = features // 2
        self.head = nn.Sequential(
            nn.Conv2d(features, half, kernel_size=3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(half, half, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(half, channels, kernel_size=1),
        )
        self.act_postprocess = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, out, kernel_size=1), resize)
            for width, out, resize in zip(widths, out_channels, reassemble_layers(out_channels), strict=True)
        )

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Four maps [F, width, h, w] -> [F, channels, 16 h, 16 w]."""
        levels = [layer(x) for layer, x in zip(self.act_postprocess, maps, strict=True)]
        return self.head(self.scratch.fuse(levels))


class DPTHead(Head):
    """Each map by a DPT over four layers' tokens; patches of 16 pixels.

    Args:
        enc_dim: Width of the encoder.
        dim: See `Head`; likewise the next two.
        features: Channels of each DPT.
        out_channels: Channels of its four projections.
    """

    def __init__(
        self,
        enc_dim: int,
        dim: int,
        num_heads: int,
        patch_size: int,
        features: int = 256,
        out_channels: Sequence[int] = (96, 192, 384, 768),
    ) -> None:
        super().__init__(dim, num_heads, patch_size, faces_forward=False)
        if patch_size != 16:
            raise ValueError(f"the DPT head's maps have 16 pixels a patch, got patch_size {patch_size}")
        widths = enc_dim, dim, dim, dim
        self.dpt_self = DPTMap(widths, _POINT_CHANNELS, features, out_channels)
        self._add_shared_parts(has_pose=False)
        self.dpt_cross = DPTMap(widths, _POINT_CHANNELS, features, out_channels)
        self.dpt_rgb = DPTMap(widths, _COLOR_CHANNELS, features, out_channels)
        self.pose_head = PoseHead(dim)

    def _raw_maps(self, tokens: Tokens, shared: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        grid = image_size[0] // self.patch_size, image_size[1] // self.patch_size
        own = tuple(x.mT.unflatten(-1, grid) for x in tokens)
        cross = (*own[:3], shared.mT.unflatten(-1, grid))
        return self.dpt_self(own), self.dpt_cross(cross), self.dpt_rgb(own)


def split_frames(tokens: Tokens, frames_per_chunk: int) -> list[Tokens]:
    """Groups of frames of at most that many."""
    parts = (x.split(frames_per_chunk) for x in tokens)
    return [Tokens(*group) for group in zip(*parts, strict=True)]


def join_frames(chunks: list[Predictions], views: int) -> Predictions:
    """Predictions of groups of frames, batch-major, -> [B, V, ...]."""
    return Predictions(*(torch.cat(parts).unflatten(0, (-1, views)) for parts in zip(*chunks, strict=True)))
