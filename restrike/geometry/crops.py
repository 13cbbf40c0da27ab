"""What a crop, a resize or a quarter turn does to the camera, and which crops each family takes.

The first half transforms cameras and is batched. The second half plans one image's crop in plain numbers, for the data
layer: VGGT's (centred on the principal point), CUT3R's (three steps), DiffusionSfM's (crop parameters in NDC).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from restrike.geometry.conventions import PIXEL_CENTER, check_trailing, full_precision

_SCALE_MARGIN = 1e-8  # CUT3R's, so that flooring a size that should come out whole does not lose a pixel


class CropBox(NamedTuple):
    """Pixels; may reach beyond the image on the right and below, where the crop is then padded."""

    left: int
    top: int
    width: int
    height: int


@full_precision
def crop_intrinsics(intrinsics: Tensor, left: Tensor | float, top: Tensor | float) -> Tensor:
    """Intrinsics [..., 3, 3] in pixels after a crop whose corner is (left, top), each a number or [...]."""
    check_trailing("intrinsics", intrinsics, 3, 3)
    shift = torch.zeros_like(intrinsics)
    shift[..., 0, 2] = torch.as_tensor(left).to(intrinsics)
    shift[..., 1, 2] = torch.as_tensor(top).to(intrinsics)
    return intrinsics - shift


@full_precision
def resize_intrinsics(
    intrinsics: Tensor, scale_x: Tensor | float, scale_y: Tensor | float, pixel_center: float = PIXEL_CENTER
) -> Tensor:
    """Intrinsics [..., 3, 3] in pixels after a resize by factors (numbers or [...]) about the image's corner."""
    check_trailing("intrinsics", intrinsics, 3, 3)
    ones = intrinsics.new_ones(intrinsics.shape[:-2])
    scale = torch.stack([ones * scale_x, ones * scale_y, ones], dim=-1)
    to_corner = torch.zeros_like(intrinsics)
    to_corner[..., :2, 2] = PIXEL_CENTER - pixel_center
    return (intrinsics + to_corner) * scale[..., None] - to_corner


@full_precision
def rotate_camera_90(
    world_to_camera: Tensor,
    intrinsics: Tensor,
    image_size: tuple[int, int],
    clockwise: bool,
    pixel_center: float = PIXEL_CENTER,
) -> tuple[Tensor, Tensor]:
    """Cameras [..., 3, 4] and intrinsics [..., 3, 3] after the image of `image_size` (H, W) turns by 90°.

    VGGT's release moves its principal points as if `pixel_center` were 0.5, whatever its pixels are.
    """
    check_trailing("world_to_camera", world_to_camera, 3, 4)
    check_trailing("intrinsics", intrinsics, 3, 3)
    height, width = image_size
    x, y, z = world_to_camera.unbind(-2)
    turned = torch.stack([-y, x, z] if clockwise else [y, -x, z], dim=-2)
    result = torch.zeros_like(intrinsics)
    result[..., 0, 0], result[..., 1, 1], result[..., 2, 2] = intrinsics[..., 1, 1], intrinsics[..., 0, 0], 1
    cx, cy = intrinsics[..., 0, 2], intrinsics[..., 1, 2]
    flip = 2 * pixel_center - 1  # the last pixel's centre is at size + flip - pixel_center
    result[..., 0, 2] = height + flip - cy if clockwise else cy
    result[..., 1, 2] = cx if clockwise else width + flip - cx
    return turned, result


def principal_point_crop(
    image_size: tuple[int, int], principal_point: tuple[float, float], target: tuple[int, int], strict: bool
) -> CropBox:
    """VGGT's crop about the principal point.

    Args:
        image_size: (H, W).
        principal_point: (cx, cy), pixels, inside the image.
        target: (H, W) wanted.
        strict: False: as large as symmetry allows, at most `target`. True: exactly `target`; what lacks on the right
            and below is padding.
    """
    starts, lengths = [], []
    for size, center, wanted in zip(image_size[::-1], principal_point, target[::-1], strict=True):
        if not 0 < center < size:
            raise ValueError(f"principal point {principal_point} lies outside the image of (H, W) = {image_size}")
        half = math.floor(min(wanted / 2, center) if strict else min(wanted / 2, center, size - center))
        starts.append(math.floor(center) - half)
        lengths.append(wanted if strict else 2 * half)
    return CropBox(starts[0], starts[1], lengths[0], lengths[1])


def covering_size(
    image_size: tuple[int, int], target: tuple[int, int], margin: float = 0.0
) -> tuple[tuple[int, int], float]:
    """VGGT's isotropic resize that covers `target` (H, W) plus `margin` pixels.

    Returns:
        New (H, W), floored, and the factor for the intrinsics: the larger of the two realised ones.
    """
    scale = max((wanted + margin) / size for size, wanted in zip(image_size, target, strict=True))
    new = (math.floor(image_size[0] * scale), math.floor(image_size[1] * scale))
    return new, max(new[0] / image_size[0], new[1] / image_size[1])


def symmetric_crop(image_size: tuple[int, int], principal_point: tuple[float, float]) -> CropBox:
    """CUT3R's first crop: the largest rectangle centred on the rounded principal point (cx, cy).

    Raises:
        ValueError: the principal point is nearer than a fifth of a side to an edge.
    """
    margins, centers = [], []
    for size, coordinate in zip(image_size[::-1], principal_point, strict=True):
        center = round(coordinate)
        margin = min(center, size - center)
        if margin <= size / 5:
            raise ValueError(
                f"principal point {principal_point} is nearer than 1/5 of the side to an edge of the image of "
                f"(H, W) = {image_size}; drop the frame"
            )
        margins.append(margin)
        centers.append(center)
    return CropBox(centers[0] - margins[0], centers[1] - margins[1], 2 * margins[0], 2 * margins[1])


class CoveringCrop(NamedTuple):
    """CUT3R's second and third step: resize to `resized` (H, W), then cut `box`; `intrinsics` are the result's."""

    resized: tuple[int, int]
    box: CropBox
    intrinsics: Tensor


@full_precision
def covering_crop(
    image_size: tuple[int, int],
    intrinsics: Tensor,
    target: tuple[int, int],
    extra: int = 0,
    pixel_center: float = PIXEL_CENTER,
) -> CoveringCrop:
    """CUT3R's resize that covers `target` (H, W) enlarged by `extra` pixels, then its central crop to `target`.

    Args:
        image_size: (H, W) of the image, its principal point nearly central already (`symmetric_crop`).
        intrinsics: [3, 3], pixels.
        target: (H, W).
        extra: Drawn from [0, aug_crop) in training, the same for both sides.
        pixel_center: Coordinate of the first pixel's centre (CUT3R: 0).
    """
    scale = max((wanted + extra) / size for size, wanted in zip(image_size, target, strict=True)) + _SCALE_MARGIN
    exact = [size * scale for size in image_size]
    resized = (math.floor(exact[0]), math.floor(exact[1]))
    intrinsics = resize_intrinsics(intrinsics, scale, scale, pixel_center)
    # The flooring cut half of what it lost from each side, as CUT3R has it.
    intrinsics = crop_intrinsics(intrinsics, (exact[1] - resized[1]) / 2, (exact[0] - resized[0]) / 2)
    top, left = (round((size - wanted) / 2) for size, wanted in zip(resized, target, strict=True))
    return CoveringCrop(resized, CropBox(left, top, target[1], target[0]), crop_intrinsics(intrinsics, left, top))


def crop_parameters(boxes: Tensor, image_size: Tensor) -> Tensor:
    """DiffusionSfM's description of square crops in isotropic NDC of the whole image (x left, y up).

    Args:
        boxes: [..., 4], (left, top, right, bottom) in pixels, square.
        image_size: [..., 2], (H, W) of the whole image. The release's demo passes the crop's own size here, which is
            wrong by up to a third of the image for 4:3.

    Returns:
        [..., 4] float64: (-x, -y) of the crop's centre, its width, and half of the long side, all in units of half the
        short side.
    """
    check_trailing("boxes", boxes, 4)
    check_trailing("image_size", image_size, 2)
    boxes, size = boxes.double(), image_size.double().flip(-1)
    longest = size.amax(-1, keepdim=True)
    stretch = longest / size.amin(-1, keepdim=True)
    center = (boxes[..., :2] + boxes[..., 2:]) / 2 + (longest - size) / 2
    width = 2 * stretch * (boxes[..., 2:3] - boxes[..., :1]) / longest
    return torch.cat([2 * stretch * center / longest - stretch, width, stretch.expand_as(width)], dim=-1)


@full_precision
def patch_centers(parameters: Tensor, patches: int) -> Tensor:
    """NDC coordinates (x, y) of the patch centres of DiffusionSfM's crops.

    Args:
        parameters: [..., 4], from `crop_parameters`.
        patches: P, per side.

    Returns:
        [..., P, P, 2] float32 at least, rows from the top, columns from the left.
    """
    check_trailing("parameters", parameters, 4)
    steps = 1 - (2 * torch.arange(patches, device=parameters.device, dtype=parameters.dtype) + 1) / patches
    x, y = (-parameters[..., k, None] + parameters[..., 2, None] / 2 * steps for k in (0, 1))
    x, y = x[..., None, :].expand(*x.shape[:-1], patches, patches), y[..., None].expand(*y.shape, patches)
    return torch.stack([x, y], dim=-1)
