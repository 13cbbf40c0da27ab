"""A photo as each family's release loads it for inference, and which part of the photo that is.

Every class takes an upright RGB photo and gives a `PhotoView`. `stack_views` pads views of several sizes with white.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from restrike.data.decode import DecodeError
from restrike.data.samples import MultiViewBatch

_WHITE = 255
_LANCZOS, _BICUBIC, _BILINEAR = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


class PhotoView(NamedTuple):
    """image: uint8 [3, H, W]; crop_box: float32 [4], its (left, top, right, bottom) in pixels of the photo; padding
    makes it reach beyond. size: (H, W) of the photo."""

    image: Tensor
    crop_box: Tensor
    size: tuple[int, int]


class PhotoTransform(Protocol):
    """What makes a network's input of a photo."""

    def __call__(self, photo: Image.Image) -> PhotoView: ...


class VGGTPhotos:
    """All the width, at `size` pixels; the height is cut to at most `size` (the release's "crop").

    Args:
        size: Pixels, a multiple of `patch_size`.
        patch_size: The height becomes its nearest multiple.
    """

    def __init__(self, size: int = 518, patch_size: int = 14) -> None:
        _check_size(size, patch_size)
        self.size, self.patch_size = size, patch_size

    def __call__(self, photo: Image.Image) -> PhotoView:
        """Resize, then cut."""
        height = max(1, round(photo.height * self.size / photo.width / self.patch_size)) * self.patch_size
        top = max(0, (height - self.size) // 2)
        box = (0, top, self.size, min(height, top + self.size))
        return _resized(photo, (height, self.size), box, _BICUBIC)


class CUT3RPhotos:
    """The long side at `size` pixels, then the middle with sides divisible by the patch; a square becomes 4:3.

    Args:
        size: Pixels.
        is_square: The short side at `size` pixels instead, and its centred square: the 224-pixel models.
        patch_size: Of the network.
        is_whole: Squeeze the picture to sides divisible by the patch instead of cutting it, as depth is evaluated.
    """

    def __init__(self, size: int = 512, is_square: bool = False, patch_size: int = 16, is_whole: bool = False) -> None:
        _check_size(size, patch_size)
        if is_whole and is_square:
            raise ValueError("data.transform: a centred square (is_square) is not the whole picture (is_whole)")
        self.size, self.is_square, self.patch_size, self.is_whole = size, is_square, patch_size, is_whole

    def for_depth(self) -> CUT3RPhotos:
        """The same as depth is evaluated: of the whole picture, but for the 224-pixel models."""
        return self if self.is_square else CUT3RPhotos(self.size, False, self.patch_size, is_whole=True)

    def __call__(self, photo: Image.Image) -> PhotoView:
        """Resize, then cut.

        Raises:
            DecodeError: so narrow a photo that no patch is left of its short side.
        """
        fixed = min(photo.size) if self.is_square else max(photo.size)
        width, height = (round(side * self.size / fixed) for side in photo.size)
        if self.is_square:
            wide = high = self.size
        else:
            wide, high = (side // self.patch_size * self.patch_size for side in (width, height))
            high = 3 * high // 4 // self.patch_size * self.patch_size if width == height else high
        if not (wide and high):
            raise DecodeError(f"{photo.height} x {photo.width} pixels are too narrow for patches of {self.patch_size}")
        method = _LANCZOS if fixed > self.size else _BICUBIC
        if self.is_whole:
            squeezed = photo.resize((width, height), method).resize((wide, high), _LANCZOS)
            box = torch.tensor([0, 0, photo.width, photo.height], dtype=torch.float32)
            return PhotoView(_to_tensor(squeezed), box, (photo.height, photo.width))
        left, top = (width - wide) // 2, (height - high) // 2
        return _resized(photo, (height, width), (left, top, left + wide, top + high), method)


class DiffusionSfMPhotos:
    """The largest centred square at `size` pixels.

    Args:
        size: Pixels.
    """

    def __init__(self, size: int = 224) -> None:
        _check_size(size, 1)
        self.size = size

    def __call__(self, photo: Image.Image) -> PhotoView:
        """Cut, then resize."""
        side = min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        box = (left, top, left + side, top + side)
        image = photo.crop(box).resize((self.size, self.size), _BILINEAR)
        return PhotoView(_to_tensor(image), torch.tensor(box, dtype=torch.float32), (photo.height, photo.width))


def stack_views(views: Sequence[PhotoView]) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one batch, each in the middle of white where sizes differ.

    Returns:
        images uint8 [V, 3, H, W], crop_boxes float32 [V, 4] and sizes int64 [V, 2] of the photos.
    """
    height, width = (max(view.image.shape[axis] for view in views) for axis in (1, 2))
    images, boxes = [], []
    for view in views:
        rows, columns = view.image.shape[1:]
        left, top = (width - columns) // 2, (height - rows) // 2
        edges = (left, width - columns - left, top, height - rows - top)
        images.append(F.pad(view.image, edges, value=_WHITE))
        across = (view.crop_box[2] - view.crop_box[0]) / columns
        down = (view.crop_box[3] - view.crop_box[1]) / rows
        grow = torch.stack([-left * across, -top * down, edges[1] * across, edges[3] * down])
        boxes.append(view.crop_box + grow)
    return torch.stack(images), torch.stack(boxes), torch.tensor([view.size for view in views])


def views_batch(keys: Sequence[str], views: Sequence[PhotoView], first_number: int = 0) -> MultiViewBatch:
    """Views of one scene as a batch whose cameras and depth are unknown (NaN and 0).

    Args:
        keys: One name a view.
        views: In order.
        first_number: Frame number of the first; the others follow.
    """
    images, boxes, sizes = stack_views(views)
    count = len(views)
    unknown = torch.zeros(1, count, 1, 1)
    return MultiViewBatch(
        images=images[None],
        depth=unknown,
        valid_depth=unknown.bool(),
        foreground=unknown.bool(),
        intrinsics=torch.full((1, count, 3, 3), torch.nan),
        world_to_camera=torch.full((1, count, 3, 4), torch.nan),
        crop_boxes=boxes[None],
        source_sizes=sizes[None],
        frame_numbers=torch.arange(first_number, first_number + count)[None],
        is_video=torch.zeros(1, count, dtype=torch.bool),
        valid=torch.ones(1, dtype=torch.bool),
        keys=list(keys),
        seed=0,
    )


def _resized(
    photo: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], method: Image.Resampling
) -> PhotoView:
    """The photo at `size` (H, W), of which `box` is taken."""
    image = photo.resize(size[::-1], method).crop(box)
    across, down = photo.width / size[1], photo.height / size[0]
    crop_box = torch.tensor(box, dtype=torch.float32) * torch.tensor([across, down, across, down])
    return PhotoView(_to_tensor(image), crop_box, (photo.height, photo.width))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _check_size(size: int, patch_size: int) -> None:
    if size < 1 or patch_size < 1 or size % patch_size:
        raise ValueError(f"data.transform.size: expected a multiple of the patch size {patch_size}, got {size}")
