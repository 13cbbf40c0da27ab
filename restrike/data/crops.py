"""Rectangles of pictures: drawn at random, scaled, centred."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from restrike.data.decode import DecodeError

_ATTEMPTS = 10


class Box(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def sample_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Rectangle of RandomResizedCrop (Szegedy et al. 2015, arXiv 1409.4842), sampled as torchvision and timm do.

    Args:
        height, width: of the picture.
        scale: range of the rectangle's share of the area, uniform.
        ratio: range of width / height, log-uniform.
        rng: source of randomness.

    Returns:
        A rectangle inside the picture; after ten draws that do not fit, the largest centred one of allowed ratio.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_ATTEMPTS):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
            return Box(int(top), int(left), crop_height, crop_width)
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        crop_width = max(1, round(height * ratio[1]))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def center_window(pixels: np.ndarray, size: tuple[int, int], fill: tuple[int, int, int]) -> np.ndarray:
    """Centre window of `size`; what it lacks is padded with `fill`."""
    lack = [max(0, wanted - have) for wanted, have in zip(size, pixels.shape[:2], strict=True)]
    if any(lack):
        top, left = lack[0] // 2, lack[1] // 2
        pixels = cv2.copyMakeBorder(pixels, top, lack[0] - top, left, lack[1] - left, cv2.BORDER_CONSTANT, value=fill)
    top, left = (round((have - wanted) / 2) for wanted, have in zip(size, pixels.shape[:2], strict=True))
    return np.ascontiguousarray(pixels[top : top + size[0], left : left + size[1]])


def cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    """A view of the rectangle.

    Raises:
        DecodeError: the rectangle is not inside, so a file's header told another size than its content.
    """
    part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    if part.shape[:2] != (box.height, box.width):
        raise DecodeError(f"header and content disagree: {box} is not inside {pixels.shape[0]} x {pixels.shape[1]}")
    return part


def scale_box(box: Box, denominator: int, size: tuple[int, int]) -> Box:
    """The nearest rectangle in the picture that decoding at 1/denominator gives."""
    if denominator == 1:
        return box
    height, width = (-(-side // denominator) for side in size)
    top, left = min(round(box.top / denominator), height - 1), min(round(box.left / denominator), width - 1)
    bottom = min(max(round((box.top + box.height) / denominator), top + 1), height)
    right = min(max(round((box.left + box.width) / denominator), left + 1), width)
    return Box(top, left, bottom - top, right - left)
