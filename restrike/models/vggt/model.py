"""VGGT (arXiv 2503.11651): one pass from images to cameras, depth, points and tracks.

Unlike its release, it keeps only the layers that heads read (four of 24) and runs none that nobody reads, computes one
rotary table a forward, and gives every size a parameter. Cameras come as world_to_camera with the first camera as the
world; the scale is that of training (mean distance of points from the first camera = 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from restrike.models.layers.block import Checkpointing
from restrike.models.layers.precision import no_autocast
from restrike.models.vggt.aggregator import Aggregator
from restrike.models.vggt.camera_head import CameraHead
from restrike.models.vggt.dpt_head import DPTFeatures, DPTHead
from restrike.models.vggt.track_head import Tracker, TrackHead

Predictions = dict[str, Any]


class VGGT(nn.Module):
    """Aggregator and up to four heads. Defaults are VGGT-1B's.

    Args:
        img_size: Side that the position table was trained for; images may have any sides divisible by `patch_size`.
        patch_size: Side of a patch.
        embed_dim: Width C of the aggregator; heads see 2 C.
        depth: Pairs of a frame block and a global block.
        num_heads: Of the aggregator's blocks.
        mlp_ratio: Hidden width of the aggregator's MLPs over C.
        num_register_tokens: Special tokens of a frame beside its camera token.
        qk_norm: LayerNorm on the aggregator's queries and keys.
        rope_base: Base of the rotary frequencies.
        init_values: Start of the layer scales.
        patch_embed: "dinov2_vits14_reg", "dinov2_vitb14_reg", "dinov2_vitl14_reg", "dinov2_vitg2_reg" or "conv".
        patch_embed_depth: Blocks of the embedder, where not the name's.
        patch_embed_num_heads: Heads of the embedder, where not the name's.
        taps: The four layers that the dense heads read, counted from 0.
        enable_camera: Has a camera head.
        enable_point: Has a point head.
        enable_depth: Has a depth head.
        enable_track: Has a track head, which runs where query points are given.
        camera_depth: Blocks of the camera head.
        camera_num_heads: Its heads.
        camera_iterations: Its rounds.
        dpt_features: Channels of the depth and point heads.
        dpt_out_channels: Channels of their four projections, and of the track head's.
        frames_per_chunk: Frames that a dense head works on at a time; changes no number.
        track_features: Channels of the track head's maps.
        track_levels: Its correlation levels.
        track_radius: Its correlation radius.
        track_iterations: Its rounds.
        track_hidden_dim: Width of its transformer.
        track_depth: Layers of its transformer.
        track_num_heads: Heads of its transformer.
        num_virtual_tracks: Virtual tracks of its transformer.
        grad_checkpointing: In training, compute activations of blocks and of chunks of frames again in the backward
            pass. "selective" keeps the results of products, so that only what is cheap is computed twice. Parts in
            eval mode are left alone.

    Raises:
        ValueError: sizes that do not fit, or no head.
    """

    family = "vggt"
    has_selective_checkpointing = True

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
        taps: Sequence[int] = (4, 11, 17, 23),
        enable_camera: bool = True,
        enable_point: bool = True,
        enable_depth: bool = True,
        enable_track: bool = True,
        camera_depth: int = 4,
        camera_num_heads: int = 16,
        camera_iterations: int = 4,
        dpt_features: int = 256,
        dpt_out_channels: Sequence[int] = (256, 512, 1024, 1024),
        frames_per_chunk: int = 8,
        track_features: int = 128,
        track_levels: int = 7,
        track_radius: int = 4,
        track_iterations: int = 4,
        track_hidden_dim: int = 384,
        track_depth: int = 6,
        track_num_heads: int = 8,
        num_virtual_tracks: int = 64,
        grad_checkpointing: Checkpointing = False,
    ) -> None:
        super().__init__()
        _check_sizes(depth, taps, dpt_out_channels)
        if not (enable_camera or enable_point or enable_depth or enable_track):
            raise ValueError("the model has no head; enable at least one of camera, point, depth, track")
        self.depth, self.taps, self.patch_size = depth, tuple(taps), patch_size
        enabled = {"camera": enable_camera, "point": enable_point, "depth": enable_depth, "track": enable_track}
        # A file may hold heads that this build does not have (fine-tuning starts from the whole model's).
        self.optional_keys = tuple(rf"^{head}_head\." for head, is_there in enabled.items() if not is_there)
        self.aggregator = Aggregator(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_register_tokens=num_register_tokens,
            qk_norm=qk_norm,
            rope_base=rope_base,
            init_values=init_values,
            patch_embed=patch_embed,
            patch_embed_depth=patch_embed_depth,
            patch_embed_num_heads=patch_embed_num_heads,
        )
        dim = 2 * embed_dim
        dense: dict[str, Any] = {"dim": dim, "patch_size": patch_size, "out_channels": dpt_out_channels}
        dense["frames_per_chunk"] = frames_per_chunk
        self.camera_head = (
            CameraHead(dim, camera_depth, camera_num_heads, camera_iterations, init_values=init_values)
            if enable_camera
            else None
        )
        self.point_head = DPTHead(4, "inv_log", features=dpt_features, **dense) if enable_point else None
        self.depth_head = DPTHead(2, "exp", features=dpt_features, **dense) if enable_depth else None
        self.track_head = None
        if enable_track:
            extractor = DPTFeatures(features=track_features, down_ratio=2, has_positions=False, **dense)
            tracker = Tracker(
                track_features, track_levels, track_radius, track_iterations,
                track_hidden_dim, track_depth, track_num_heads, num_virtual_tracks,
            )  # fmt: skip
            self.track_head = TrackHead(extractor, tracker)
        self.set_grad_checkpointing(grad_checkpointing)

    def set_grad_checkpointing(self, enable: Checkpointing = True) -> None:
        """See `grad_checkpointing`."""
        self.aggregator.set_grad_checkpointing(enable)
        for module in self.modules():
            if isinstance(module, CameraHead | DPTFeatures):
                module.grad_checkpointing = enable

    def forward(self, images: Tensor, query_points: Tensor | None = None) -> Predictions:
        """Everything that the heads say of a scene.

        Args:
            images: [B, V, 3, H, W], or [V, 3, H, W] for one scene; values in [0, 1], sides divisible by `patch_size`.
            query_points: [B, N, 2], or [N, 2] for one scene: (x, y) pixels in the first view, for the track head.

        Returns:
            pose_enc: [B, V, 9], see `restrike.geometry.decode_pose_fov`; pose_enc_list: the same of every round.
            depth: [B, V, H, W, 1], z-depth > 0; depth_conf: [B, V, H, W] ≥ 1.
            world_points: [B, V, H, W, 3], in the first camera; world_points_conf: [B, V, H, W] ≥ 1.
            track: [B, V, N, 2] pixels; vis, conf: [B, V, N] probabilities; in training also track_list (every round),
            vis_logits, conf_logits.
            images: In eval mode.
        """
        images = self._check_images(images)
        if query_points is not None and query_points.ndim == 2:
            query_points = query_points[None]
        size = images.shape[-2], images.shape[-1]
        tokens = self.aggregator(images, self._layers_read(query_points is not None))
        predictions: Predictions = {}
        with no_autocast(images.device):
            if self.camera_head is not None:
                encodings = self.camera_head(self._as_weights(tokens[self.depth - 1][:, :, 0]))
                predictions |= {"pose_enc": encodings[-1], "pose_enc_list": encodings}
            if self.depth_head is not None or self.point_head is not None:
                patches = [self._as_weights(x) for x in self._patches(tokens)]
            if self.depth_head is not None:
                predictions["depth"], predictions["depth_conf"] = self.depth_head(patches, size)
            if self.point_head is not None:
                predictions["world_points"], predictions["world_points_conf"] = self.point_head(patches, size)
        if self.track_head is not None and query_points is not None:
            tracks = self.track_head(self._patches(tokens), size, query_points)
            predictions |= {"track": tracks.coords[-1], "vis": tracks.visibility.sigmoid()}
            predictions["conf"] = tracks.confidence.sigmoid()
            if self.training:
                predictions |= {"track_list": tracks.coords}
                predictions |= {"vis_logits": tracks.visibility, "conf_logits": tracks.confidence}
        if not self.training:
            predictions["images"] = images
        return predictions

    def _layers_read(self, has_queries: bool) -> set[int]:
        is_dense = self.depth_head is not None or self.point_head is not None
        layers = set(self.taps) if is_dense or (self.track_head is not None and has_queries) else set()
        layers |= {self.depth - 1} if self.camera_head is not None else set()
        if not layers:
            raise ValueError("the model has a track head only, which needs query_points; got none")
        return layers

    def _patches(self, tokens: dict[int, Tensor]) -> list[Tensor]:
        return [tokens[i][:, :, self.aggregator.num_special_tokens :] for i in self.taps]

    def _as_weights(self, x: Tensor) -> Tensor:
        """Tokens in the heads' own type: float32, whatever autocast made of them."""
        return x.to(self.aggregator.camera_token.dtype)

    def _check_images(self, images: Tensor) -> Tensor:
        if images.ndim == 4:
            images = images[None]
        if images.ndim != 5 or images.shape[2] != 3:
            raise ValueError(f"images: expected [B, V, 3, H, W] or [V, 3, H, W], got {list(images.shape)}")
        return images


def _check_sizes(depth: int, taps: Sequence[int], out_channels: Sequence[int]) -> None:
    if len(taps) != 4 or any(not 0 <= tap < depth for tap in taps):
        raise ValueError(
            f"taps: expected four layers of 0 … {depth - 1}, got {list(taps)}; set them together with depth"
        )
    if len(out_channels) != 4:
        raise ValueError(f"dpt_out_channels: expected four widths, got {list(out_channels)}")
