"""Image files to CUT3R's input, as its evaluation loads them (arXiv 2501.12387, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FitMode = Literal["crop", "resize"]
_PATCH = 16


def load_views(files: Sequence[str | PathLike[str]], size: int = 512, mode: FitMode = "crop") -> Tensor:
    """Images of one scene, of one shape.

    Args:
        files: At least one; JPEG, PNG or whatever Pillow reads.
        size: 512, or another long side; 224 gives the short side 224 and the central square (the linear model).
        mode: How sides become multiples of 16: "crop" about the centre (trajectories), or "resize" (depth).

    Returns:
        [V, 3, H, W] in [-1, 1]; a square becomes 4:3, unless `size` is 224.

    Raises:
        ValueError: no file, an unknown mode, a file that is no image, or images of different shapes.
    """
    if not files:
        raise ValueError("expected at least one image file, got none")
    if mode not in get_args(FitMode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(FitMode))}, got {mode!r}")
    images = [fit_view(_open(file), size, mode) for file in files]
    if others := [f"{file} is {list(x.shape[1:])}" for file, x in zip(files, images, strict=True)
                  if x.shape != images[0].shape]:  # fmt: skip
        raise ValueError(f"images of one scene need one shape; {files[0]} is {list(images[0].shape[1:])}, {others[0]}")
    return torch.stack(images)


def fit_view(image: Image.Image, size: int = 512, mode: FitMode = "crop") -> Tensor:
    """One RGB image to [3, H, W] in [-1, 1]; see `load_views`."""
    is_square_model = size == 224
    side = min(image.size) if is_square_model else max(image.size)
    image = _resized(image, (round(image.width * size / side), round(image.height * size / side)))
    if is_square_model:
        width = height = size
    else:
        width, height = (length // _PATCH * _PATCH for length in image.size)
        if width == height:
            height = height * 3 // 4 // _PATCH * _PATCH
    if mode == "resize" and not is_square_model and image.width != image.height:
        image = _resized(image, (width, height))
    left, top = image.width // 2 - width // 2, image.height // 2 - height // 2
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 127.5 - 1


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    shrinks = max(size) < max(image.size)
    return image.resize(size, Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC)


def _open(file: str | PathLike[str]) -> Image.Image:
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is no image that Pillow reads") from error
