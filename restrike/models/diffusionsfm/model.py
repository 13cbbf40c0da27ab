"""DiffusionSfM (arXiv 2505.05473): from images and noisy rays to clean ones, one a patch (sparse) or a pixel (dense).

A view is a map of 8 channels: the ray's origin (the camera centre) and its endpoint (the surface), each as a unit
4-vector. The network predicts the clean map, not the noise. Unlike its release, it encodes images once a scene, takes
what depends on the time alone from a table where there is one (`time_table`), and runs no layer that nobody reads.
Axes are PyTorch3D's, the first view is the world, coordinates are NDC: `targets.py` and `cameras.py` are the border.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from restrike.models.diffusionsfm.decoder import ImageProjection, RayDecoder
from restrike.models.diffusionsfm.schedule import NoiseSchedule, ScheduleType
from restrike.models.diffusionsfm.transformer import Modulations, RayTransformer
from restrike.models.layers.dinov2 import DinoVisionTransformer
from restrike.models.layers.linear import Linear

RAY_CHANNELS = 8
_PATCH = 16  # pixels of the dense map per patch side


class ImageFeatures(NamedTuple):
    """What images give to every step: patches [B, V, C, h, w]; dense: the decoder's skips, each [B, V, F, H, W]."""

    patches: Tensor
    skips: tuple[Tensor, ...] = ()

    def views(self, index: Tensor) -> ImageFeatures:
        """Those of some views, [B, index.numel()]."""
        return ImageFeatures(self.patches[:, index], tuple(skip[:, index] for skip in self.skips))


class TimeTable(NamedTuple):
    """What T times give: `modulations` of the transformer and of the decoder (none if sparse)."""

    transformer: Modulations
    decoder: list[Tensor]

    def row(self, i: int) -> TimeTable:
        """Of one time, to be broadcast over a batch."""
        blocks, final = self.transformer
        modulations = Modulations([x[i : i + 1] for x in blocks], final[i : i + 1])
        return TimeTable(modulations, [x[i : i + 1] for x in self.decoder])


class ImageEncoder(nn.Module):
    """Holds DINOv2 under the name that checkpoints have for it."""

    def __init__(self, model: DinoVisionTransformer) -> None:
        super().__init__()
        self.model = model


class DiffusionSfM(nn.Module):
    """Image encoder, diffusion transformer, and a ray embedding (sparse) or a DPT decoder (dense).

    Args:
        is_dense: Rays per pixel of a map 16 times as fine as the patch grid, instead of one per patch.
        depth: Blocks of the transformer.
        width: Patches per side of a view.
        hidden_size: Width of the transformer's tokens.
        num_heads: Its heads.
        mlp_ratio: Hidden width of its MLPs over `hidden_size`.
        max_num_images: Views of one call, at most; more need `sample_rays`.
        img_size: Side of the images, pixels.
        patch_size: Pixels of the image encoder's patches.
        encoder_dim: Width of the image encoder (DINOv2 ViT-S/14).
        encoder_depth: Its blocks.
        encoder_num_heads: Its heads.
        encoder_taps: The two of its blocks that the decoder reads.
        position_offset: 0.1 resamples the encoder's position table as DINOv2's code does and as the released weights
            expect (positions step by 37/16.1); 0 resamples it to the exact size.
        taps: The two blocks of the transformer that the decoder reads; None: at three quarters, and the last.
        embed_dim: Channels of the ray embedding.
        decoder_features: Channels of the decoder.
        attend_within_views: See `RayTransformer`.
        noise_schedule: See `NoiseSchedule`, as the four that follow.
        max_timesteps: Times of the diffusion.
        beta_start: First beta.
        beta_end: Last beta.
        cos_power: Of the cosine schedule.
        grad_checkpointing: In training, compute activations of blocks again in the backward pass.

    Raises:
        ValueError: sizes that do not fit.
    """

    family = "diffusionsfm"
    scratch: Any
    project_opers: Any

    def __init__(
        self,
        is_dense: bool = False,
        depth: int = 16,
        width: int = 16,
        hidden_size: int = 1152,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        max_num_images: int = 8,
        img_size: int = 224,
        patch_size: int = 14,
        encoder_dim: int = 384,
        encoder_depth: int = 12,
        encoder_num_heads: int = 6,
        encoder_taps: tuple[int, int] = (5, 11),
        position_offset: float = 0.1,
        taps: tuple[int, int] | None = None,
        embed_dim: int = 384,
        decoder_features: int = 256,
        attend_within_views: bool = False,
        noise_schedule: ScheduleType = "linear",
        max_timesteps: int = 100,
        beta_start: float = 0.0120,
        beta_end: float = 0.00085,
        cos_power: float = 2,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        taps = (depth * 3 // 4 - 1, depth - 1) if taps is None else taps
        if is_dense:
            _check_taps("taps", taps, depth)
            _check_taps("encoder_taps", encoder_taps, encoder_depth)
        self.is_dense, self.width, self.img_size = is_dense, width, img_size
        self.taps, self.encoder_taps = tuple(taps), tuple(encoder_taps)
        self.map_size = width * _PATCH if is_dense else width
        self.noise_scheduler = NoiseSchedule(noise_schedule, max_timesteps, beta_start, beta_end, cos_power)
        self.feature_extractor = ImageEncoder(
            DinoVisionTransformer(
                img_size=37 * patch_size,  # the side of DINOv2's position table
                patch_size=patch_size,
                embed_dim=encoder_dim,
                depth=encoder_depth,
                num_heads=encoder_num_heads,
                num_register_tokens=0,
                antialias=False,
                interpolate_offset=position_offset,
            )
        )
        self.ray_predictor = RayTransformer(
            encoder_dim + embed_dim + 2,
            RAY_CHANNELS,
            width,
            hidden_size,
            depth,
            num_heads,
            mlp_ratio,
            max_num_images,
            attend_within_views,
        )
        if is_dense:
            self.scratch = RayDecoder(encoder_dim, hidden_size, decoder_features, embed_dim)
            self.project_opers = nn.ModuleList(ImageProjection(encoder_dim) for _ in encoder_taps)
            self.ray_predictor.final_layer.requires_grad_(False)  # nobody reads it; DDP would wait for its gradient
        else:
            self.scratch = nn.Module()
            self.scratch.input_conv = Linear(RAY_CHANNELS + 1, embed_dim)
        self.set_grad_checkpointing(grad_checkpointing)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `grad_checkpointing`."""
        self.feature_extractor.model.grad_checkpointing = enable
        self.ray_predictor.grad_checkpointing = enable

    @property
    def max_num_images(self) -> int:
        """Views of one call, at most."""
        return self.ray_predictor.x_pos_enc.max_views

    def encode(self, images: Tensor) -> ImageFeatures:
        """Everything that follows from normalised images [B, V, 3, H, W] alone."""
        if images.ndim != 5 or tuple(images.shape[2:]) != (3, self.img_size, self.img_size):
            raise ValueError(
                f"images: expected [B, V, 3, {self.img_size}, {self.img_size}], got {list(images.shape)}; "
                "crop and resize them (`load_images`), or build the model with another img_size"
            )
        lead = images.shape[:2]
        tokens, taps = self.feature_extractor.model.forward_features(
            images.flatten(0, 1), self.encoder_taps if self.is_dense else ()
        )
        patches = _as_map(tokens[:, 1:])
        patches = F.interpolate(patches, (self.width, self.width), mode="bilinear", align_corners=False)
        if not self.is_dense:
            return ImageFeatures(patches.unflatten(0, lead))
        maps = [_as_map(project(tap)) for project, tap in zip(self.project_opers, taps, strict=True)]
        skips = tuple(skip.unflatten(0, lead) for skip in self.scratch.image_skips(maps))
        return ImageFeatures(patches.unflatten(0, lead), skips)

    def time_table(self, timesteps: Tensor) -> TimeTable:
        """Everything that follows from times [T] alone: a third of the transformer's weights."""
        decoder = self.scratch.modulations(timesteps) if self.is_dense else []
        return TimeTable(self.ray_predictor.modulations(timesteps), decoder)

    def forward(
        self, images: Tensor, noisy: Tensor, coords: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Clean rays of noisy ones, as in training.

        Args:
            images: [B, V, 3, H, W], normalised with ImageNet's mean and deviation.
            noisy: [B, V, 8, P, P], P = `map_size`.
            coords: [B, V, 2, h, w], NDC of the patch centres (`ndc_coordinates`).
            timesteps: [B] or [1].
            mask: [B, V, P, P], 1 where depth is known; None: everywhere.

        Returns:
            [B, V, 8, P, P]; its 4-vectors are not of unit length.
        """
        return self.denoise(self.encode(images), noisy, coords, timesteps, mask)

    def denoise(
        self,
        features: ImageFeatures,
        noisy: Tensor,
        coords: Tensor,
        time: Tensor | TimeTable,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, with images encoded before, and times [B] or [1] or their `time_table`."""
        self._check_map(noisy)
        mask = torch.ones_like(noisy[:, :, :1]) if mask is None else mask[:, :, None].to(noisy)
        rays = self._embed(torch.cat([noisy, mask], dim=2))
        x = torch.cat([features.patches, rays, coords.to(rays)], dim=2)
        modulations = time.transformer if isinstance(time, TimeTable) else time
        tokens, maps = self.ray_predictor.forward_features(x, modulations, self.taps if self.is_dense else ())
        if not self.is_dense:
            return self.ray_predictor.predict(tokens, modulations, x)
        timed = time.decoder if isinstance(time, TimeTable) else self.scratch.modulations(time)
        batch, views = noisy.shape[:2]
        timed = [row if len(row) == 1 else row.repeat_interleave(views, dim=0) for row in timed]
        skips = [skip.flatten(0, 1) for skip in features.skips]
        return self.scratch(skips, maps, timed).unflatten(0, (batch, views))

    def _embed(self, x: Tensor) -> Tensor:
        """[B, V, 9, P, P] -> [B, V, embed_dim, h, w]."""
        if self.is_dense:
            return self.scratch.input_conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.scratch.input_conv(x.movedim(2, -1)).movedim(-1, 2)

    def _check_map(self, noisy: Tensor) -> None:
        wanted = (RAY_CHANNELS, self.map_size, self.map_size)
        if noisy.ndim != 5 or tuple(noisy.shape[2:]) != wanted:
            kind = "dense" if self.is_dense else "sparse"
            raise ValueError(
                f"rays: the {kind} model expects [B, V, {', '.join(map(str, wanted))}], got {list(noisy.shape)}; "
                f"data.transform.depth_size must be {self.map_size}"
            )


def _as_map(tokens: Tensor) -> Tensor:
    """[B, h², C] -> [B, C, h, h]."""
    side = round(tokens.shape[1] ** 0.5)
    return rearrange(tokens, "b (h w) c -> b c h w", h=side)


def _check_taps(name: str, taps: tuple[int, ...], depth: int) -> None:
    if len(taps) != 2 or any(not 0 <= tap < depth for tap in taps):
        raise ValueError(f"{name}: expected two blocks of 0 … {depth - 1}, got {list(taps)}")
