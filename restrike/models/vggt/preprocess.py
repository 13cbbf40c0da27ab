"""Image files to VGGT's input: how its release loads them for inference.

Transparent pixels become white. Padding is white too, but black in the square form that bundle adjustment uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

LoadMode = Literal["crop", "pad"]
File = str | PathLike[str]
_WHITE = 1.0


def load_images(files: Sequence[File], mode: LoadMode = "crop", size: int = 518, patch_size: int = 14) -> Tensor:
    """Images of one scene.

    Args:
        files: At least one; JPEG, PNG or whatever Pillow reads.
        mode: "crop" gives all the width `size` and cuts the height to at most `size`; "pad" gives the longer side
            `size` and pads to a square.
        size: Pixels, a multiple of `patch_size`.
        patch_size: The other side becomes its nearest multiple.

    Returns:
        [V, 3, H, W] in [0, 1]; images of different shapes are centred in white.

    Raises:
        ValueError: no file, an unknown mode, or a file that is no image.
    """
    if not files:
        raise ValueError("expected at least one image file, got none")
    if mode not in get_args(LoadMode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(LoadMode))}, got {mode!r}")
    images = []
    for file in files:
        image = open_rgb(file)
        fixed = image.width if mode == "crop" else max(image.size)  # becomes `size`, of which patches are a divisor
        width, height = (max(1, round(length * size / fixed / patch_size)) * patch_size for length in image.size)
        x = _to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))
        if mode == "crop":
            top = max(0, (height - size) // 2)
            images.append(x[:, top : top + size])
        else:
            images.append(_pad(x, (size, size)))
    largest = max(x.shape[1] for x in images), max(x.shape[2] for x in images)
    return torch.stack([_pad(x, largest) for x in images])


def load_square_images(files: Sequence[File], size: int = 1024) -> tuple[Tensor, Tensor]:
    """Images padded to squares with black, then resized.

    Returns:
        [V, 3, size, size] in [0, 1], and [V, 6]: left, top, right, bottom of the picture in the square, then the
        file's own width and height.
    """
    images, boxes = [], []
    for file in files:
        image = open_rgb(file)
        side = max(image.size)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        square = Image.new("RGB", (side, side))
        square.paste(image, (left, top))
        images.append(_to_tensor(square.resize((size, size), Image.Resampling.BICUBIC)))
        box = torch.tensor([left, top, left + image.width, top + image.height]) * (size / side)
        boxes.append(torch.cat([box, torch.tensor(image.size)]))
    return torch.stack(images), torch.stack(boxes)


def open_rgb(file: File) -> Image.Image:
    """A file's picture in RGB, over white where it is transparent.

    Raises:
        ValueError: the file is missing or no image.
    """
    try:
        with Image.open(file) as image:
            if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
                return image.convert("RGB")
            picture = image.convert("RGBA")
    except FileNotFoundError as error:
        raise ValueError(f"no image file {file}") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{file} is no image that Pillow can read ({error}); convert it to JPEG or PNG") from error
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _pad(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, h, w] centred in a white [3, *size]."""
    height, width = size[0] - x.shape[1], size[1] - x.shape[2]
    left, top = width // 2, height // 2
    return F.pad(x, (left, width - left, top, height - top), value=_WHITE)
