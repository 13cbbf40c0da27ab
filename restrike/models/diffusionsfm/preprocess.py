"""Pictures from files as DiffusionSfM takes them: the largest centred square, resized, ImageNet-normalised."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class LoadedImages(NamedTuple):
    """images: [V, 3, S, S] normalised; crop_boxes: [V, 4] in pixels of the files; source_sizes: [V, 2], (H, W).

    `crop_parameters(crop_boxes, source_sizes)` describes the crops. The release's demo passes the size of the *crop*
    there, which moves the coordinates of a 4:3 picture by a third of its short side: `released_sizes` keeps that.
    """

    images: Tensor
    crop_boxes: Tensor
    source_sizes: Tensor

    def released_sizes(self) -> Tensor:
        """The sizes that the release confuses with the files': those of the crops, [V, 2]."""
        sides = self.crop_boxes[:, 2:] - self.crop_boxes[:, :2]
        return sides.flip(-1).to(self.source_sizes)


def load_images(paths: Sequence[str | os.PathLike[str]], img_size: int = 224) -> LoadedImages:
    """Files in the order given (the release sorts them by path).

    Raises:
        ValueError: no file, or one that is no image.
    """
    if not paths:
        raise ValueError("load_images: no file was given")
    images, boxes, sizes = [], [], []
    for path in paths:
        pixels = _read(path)
        height, width = pixels.shape[:2]
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        crop = torch.from_numpy(pixels[top : top + side, left : left + side].copy()).permute(2, 0, 1).float() / 255
        crop = F.interpolate(crop[None], (img_size, img_size), mode="bilinear", antialias=True, align_corners=False)
        images.append(crop[0])
        boxes.append([left, top, left + side, top + side])
        sizes.append([height, width])
    mean, std = torch.tensor(_MEAN)[:, None, None], torch.tensor(_STD)[:, None, None]
    return LoadedImages((torch.stack(images) - mean) / std, torch.tensor(boxes).float(), torch.tensor(sizes))


def _read(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{os.fspath(path)} is no image that can be read: {error}") from error
