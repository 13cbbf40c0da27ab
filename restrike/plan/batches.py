"""Batches as the device gets them, without values: meta tensors of the right shapes and types."""

from __future__ import annotations

from typing import Any

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


def with_values(batch: ImageBatch | MultiViewBatch) -> ImageBatch | MultiViewBatch:
    """The same batch on the CPU, to be timed: noise for images, class 0, and cameras side by side before a wall."""

    def fill(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = torch.zeros(value.shape, dtype=value.dtype, device="cpu")
        return torch.ones_like(made) if made.dtype == torch.bool else made

    filled = batch._replace(**{name: fill(value) for name, value in batch._asdict().items()})
    images = torch.rand(batch.images.shape, device="cpu")
    if not isinstance(filled, MultiViewBatch):
        return filled._replace(images=images)
    height, width = images.shape[-2:]
    cameras = torch.eye(3, 4, device="cpu").expand(filled.world_to_camera.shape).clone()
    cameras[..., 0, 3] = 0.1 * torch.arange(images.shape[1], device="cpu")
    lens = torch.tensor([[width, 0.0, width / 2], [0.0, width, height / 2], [0.0, 0.0, 1.0]], device="cpu")
    return filled._replace(
        images=images,
        depth=1 + torch.rand(filled.depth.shape, device="cpu"),
        intrinsics=lens.expand(filled.intrinsics.shape).clone(),
        world_to_camera=cameras,
        crop_boxes=torch.tensor([0.0, 0.0, width, height], device="cpu").expand(filled.crop_boxes.shape).clone(),
        source_sizes=torch.tensor([height, width], device="cpu").expand(filled.source_sizes.shape).clone(),
    )
