"""What a network says of the views of a scene, in the pixels of the whole photos."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from restrike.geometry import crop_intrinsics, resize_intrinsics


class PredictedViews(NamedTuple):
    """Conventions of `restrike.geometry.conventions`.

    Attributes:
        world_to_camera: [B, V, 3, 4], OpenCV axes; NaN where no camera was found.
        intrinsics: [B, V, 3, 3], pixels of the whole photos.
        depth: [B, V, P, Q], z-depth; its grid covers the crop that the network saw.
        confidence: [B, V, P, Q], larger is surer; None where the family has none.
    """

    world_to_camera: Tensor
    intrinsics: Tensor
    depth: Tensor
    confidence: Tensor | None = None


def whole_photo_intrinsics(intrinsics: Tensor, crop_boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Intrinsics of crops as those of the photos that they were cut from.

    Args:
        intrinsics: [..., 3, 3], pixels of images of `size` (H, W).
        crop_boxes: [..., 4], (left, top, right, bottom) of these images in pixels of the photos.
    """
    left, top, right, bottom = crop_boxes.to(intrinsics).unbind(-1)
    scaled = resize_intrinsics(intrinsics, (right - left) / size[1], (bottom - top) / size[0])
    return crop_intrinsics(scaled, -left, -top)


def crop_pixel_intrinsics(intrinsics: Tensor, crop_boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `whole_photo_intrinsics`."""
    left, top, right, bottom = crop_boxes.to(intrinsics).unbind(-1)
    moved = crop_intrinsics(intrinsics, left, top)
    return resize_intrinsics(moved, size[1] / (right - left), size[0] / (bottom - top))


def cell_centers(crop_box: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels [P, Q, 2] of the photo where the cells of a map over its crop [4] have their middle."""
    left, top, right, bottom = crop_box.tolist()
    x = left + (torch.arange(grid[1]) + 0.5) * ((right - left) / grid[1])
    y = top + (torch.arange(grid[0]) + 0.5) * ((bottom - top) / grid[0])
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
