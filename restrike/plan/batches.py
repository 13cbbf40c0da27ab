"""Batches as the device gets them, without values: meta tensors of the right shapes and types."""

from __future__ import annotations

import torch
from torch import Tensor

from restrike.data.samples import ImageBatch, MultiViewBatch


def meta_images(batch_size: int, image_size: int, num_classes: int, soft_targets: bool) -> ImageBatch:
    """Normalised images, with class indices or the soft targets of mixing."""
    targets = _empty(batch_size, num_classes) if soft_targets else _empty(batch_size, dtype=torch.int64)
    images, valid = _empty(batch_size, 3, image_size, image_size), _empty(batch_size, dtype=torch.bool)
    return ImageBatch(images, targets, valid, [""] * batch_size, seed=0)


def meta_views(scenes: int, views: int, size: tuple[int, int], depth_size: tuple[int, int]) -> MultiViewBatch:
    """Scenes of several views; `depth_size` is (P, Q) of depth and masks."""
    pixels = scenes, views, *depth_size
    return MultiViewBatch(
        images=_empty(scenes, views, 3, *size),
        depth=_empty(*pixels),
        valid_depth=_empty(*pixels, dtype=torch.bool),
        foreground=_empty(*pixels, dtype=torch.bool),
        intrinsics=_empty(scenes, views, 3, 3),
        world_to_camera=_empty(scenes, views, 3, 4),
        crop_boxes=_empty(scenes, views, 4),
        source_sizes=_empty(scenes, views, 2, dtype=torch.int64),
        frame_numbers=_empty(scenes, views, dtype=torch.int64),
        is_video=_empty(scenes, views, dtype=torch.bool),
        valid=_empty(scenes, dtype=torch.bool),
        keys=[""] * scenes,
        seed=0,
    )


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
