"""The typed batches that leave the data layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ImageBatch(NamedTuple):
    """A batch of labelled images.

    Attributes:
        images: uint8 [B, 3, H, W] from the loader; float and normalised after the datamodule's transfer hook.
        targets: int64 [B] class index (-1 = unknown), or float32 [B, K] soft targets after mixing.
        valid: bool [B]; False marks a padding row of an evaluation batch (never in training): no metric, loss or
            writer may count it.
        keys: one name a row, for messages and predictions; "" in padding rows.
        seed: pure function of (seed, epoch, step, rank); drives what is random on the device (erasing).
    """

    images: Tensor
    targets: Tensor
    valid: Tensor
    keys: list[str]
    seed: int


class MultiViewSample(NamedTuple):
    """V views of one scene, in the conventions of `restrike.geometry.conventions` (OpenCV axes, corner origin).

    Attributes:
        images: uint8, or float32 in [0, 1], [V, 3, H, W].
        depth: float32 [V, P, Q], z-depth in the scene's unit, 0 (or DiffusionSfM's -1) where unknown. The grid may be
            coarser than the image.
        valid_depth: bool [V, P, Q], where depth was measured.
        foreground: bool [V, P, Q], the object.
        intrinsics: float32 [V, 3, 3], pixels of `images`.
        world_to_camera: float32 [V, 3, 4].
        crop_boxes: float32 [V, 4], the image's (left, top, right, bottom) in pixels of the stored picture.
        source_sizes: int64 [V, 2], (H, W) of the stored picture.
        frame_numbers: int64 [V].
        is_video: bool [V]; view comes from an ordered video.
    """

    images: Tensor
    depth: Tensor
    valid_depth: Tensor
    foreground: Tensor
    intrinsics: Tensor
    world_to_camera: Tensor
    crop_boxes: Tensor
    source_sizes: Tensor
    frame_numbers: Tensor
    is_video: Tensor


class MultiViewBatch(NamedTuple):
    """Scenes of equal view count and size: the fields of `MultiViewSample` with [B] in front.

    Attributes:
        images: [B, V, 3, H, W], uint8 or float in [0, 1] from the loader; float and normalised after the datamodule's
            transfer hook.
        valid: bool [B]; False marks a padding row of an evaluation batch.
        keys: "<category>/<sequence>" a row, "" in padding rows.
        seed: pure function of (seed, epoch, step, rank); drives what is random on the device.
    """

    images: Tensor
    depth: Tensor
    valid_depth: Tensor
    foreground: Tensor
    intrinsics: Tensor
    world_to_camera: Tensor
    crop_boxes: Tensor
    source_sizes: Tensor
    frame_numbers: Tensor
    is_video: Tensor
    valid: Tensor
    keys: list[str]
    seed: int
