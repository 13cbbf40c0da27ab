"""Points followed through all frames (arXiv 2503.11651, section 3.3), by a CoTracker-like refinement.

The released training code has no loss for it; `restrike.losses.track_loss` is the paper's. It runs in the outer
autocast, unlike the other heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from restrike.models.layers.linear import Linear
from restrike.models.layers.mlp import Mlp
from restrike.models.vggt.dpt_head import DPTFeatures
from restrike.models.vggt.track_features import (
    MAX_SCALE,
    correlate,
    embed_motion,
    feature_pyramid,
    position_table,
    sample_maps,
)
from restrike.models.vggt.track_former import TrackFormer

_STRIDE = 2  # image pixels per pixel of the feature maps


class Tracks(NamedTuple):
    """Query points found again in every frame."""

    coords: list[Tensor]  # one a round: [B, V, N, 2], (x, y) in image pixels
    visibility: Tensor  # [B, V, N] logits
    confidence: Tensor  # [B, V, N] logits


class Tracker(nn.Module):
    """Rounds of refinement on feature maps.

    Args:
        features: Channels of the maps and of a track's features.
        levels: Of the correlation pyramid.
        radius: Of the correlation window.
        iterations: Rounds.
        hidden_dim: Width of the transformer.
        depth: Its layers.
        num_heads: Its heads.
        num_virtual_tracks: Its virtual tracks.
    """

    def __init__(
        self,
        features: int = 128,
        levels: int = 7,
        radius: int = 4,
        iterations: int = 4,
        hidden_dim: int = 384,
        depth: int = 6,
        num_heads: int = 8,
        num_virtual_tracks: int = 64,
    ) -> None:
        super().__init__()
        self.features, self.levels, self.radius, self.iterations = features, levels, radius, iterations
        self.motion_width = features // 2
        input_dim = 2 * features + 2 * self.motion_width + 4
        self.query_ref_token = nn.Parameter(torch.randn(1, 2, input_dim))
        self.corr_mlp = Mlp(levels * (2 * radius + 1) ** 2, hidden_dim, out_dim=features)
        self.updateformer = TrackFormer(input_dim, features + 2, hidden_dim, depth, num_heads, num_virtual_tracks)
        self.fmap_norm = nn.LayerNorm(features)
        self.ffeat_norm = nn.GroupNorm(1, features)
        self.ffeat_updater = nn.Sequential(Linear(features, features), nn.GELU())
        self.vis_predictor = nn.Sequential(Linear(features, 1))
        self.conf_predictor = nn.Sequential(Linear(features, 1))

    def forward(self, maps: Tensor, query_points: Tensor, iterations: int | None = None) -> Tracks:
        """Follow points.

        Args:
            maps: [B, V, features, h, w].
            query_points: [B, N, 2], (x, y) in pixels of the maps, in the first frame.
            iterations: Rounds, where not those of the constructor.

        Returns:
            Tracks, with coordinates in pixels of the maps.
        """
        maps = self.fmap_norm(maps.movedim(2, -1)).movedim(-1, 2)
        pyramid = feature_pyramid(maps, self.levels)
        num_views = maps.shape[1]
        coords = query_points[:, None].expand(-1, num_views, -1, -1)
        features = self._as_weights(sample_maps(maps[:, 0], query_points))[:, None].expand(-1, num_views, -1, -1)
        identity = self._identity(maps.shape[-2:], query_points, num_views)
        found = []
        for _ in range(self.iterations if iterations is None else iterations):
            coords = coords.detach()  # as released: a round's gradient stays in the round
            known = torch.cat([self._motion(coords), self._correlation(pyramid, features, coords), features], dim=-1)
            change = self.updateformer(self._as_weights(known + identity).transpose(1, 2)).transpose(1, 2)
            features = features + self._feature_change(change[..., 2:])
            coords = torch.cat([query_points[:, None], (coords + change[..., :2])[:, 1:]], dim=1)
            found.append(coords)
        return Tracks(found, self.vis_predictor(features)[..., 0], self.conf_predictor(features)[..., 0])

    def _identity(self, size: torch.Size, query_points: Tensor, num_views: int) -> Tensor:
        """What tells a track and the first frame from others, [B, V, N, input_dim]; the same in every round."""
        table = position_table(self.query_ref_token.shape[-1], (size[0], size[1]), query_points.device)
        place = sample_maps(table.expand(query_points.shape[0], -1, -1, -1), query_points)
        first, other = self.query_ref_token[:, :1, None], self.query_ref_token[:, 1:, None]
        return place[:, None] + torch.cat([first, other.expand(-1, num_views - 1, -1, -1)], dim=1)

    def _motion(self, coords: Tensor) -> Tensor:
        motion = coords - coords[:, :1]
        return torch.cat([embed_motion(motion, self.motion_width), motion / MAX_SCALE, motion / MAX_SCALE], dim=-1)

    def _correlation(self, pyramid: list[Tensor], features: Tensor, coords: Tensor) -> Tensor:
        return self.corr_mlp(self._as_weights(correlate(pyramid, features, coords, self.radius)))

    def _as_weights(self, x: Tensor) -> Tensor:
        """Places and sums of them are float32 whatever the weights are; linear layers want the weights' type."""
        return x.to(self.query_ref_token.dtype)

    def _feature_change(self, change: Tensor) -> Tensor:
        return self.ffeat_updater(self.ffeat_norm(change.flatten(0, -2))).view_as(change)


class TrackHead(nn.Module):
    """Tokens of four layers and query points to tracks.

    Args:
        feature_extractor: Makes the maps, at half the image's sides.
        tracker: Follows points in them.
    """

    def __init__(self, feature_extractor: DPTFeatures, tracker: Tracker) -> None:
        super().__init__()
        self.feature_extractor = feature_extractor
        self.tracker = tracker

    def forward(
        self,
        patch_tokens: Sequence[Tensor],
        image_size: tuple[int, int],
        query_points: Tensor,
        iterations: int | None = None,
    ) -> Tracks:
        """Query points [B, N, 2] in image pixels (x, y) of the first frame, to tracks in image pixels."""
        maps = self.feature_extractor(patch_tokens, image_size)
        tracks = self.tracker(maps, query_points / _STRIDE, iterations)
        return tracks._replace(coords=[_STRIDE * coords for coords in tracks.coords])
