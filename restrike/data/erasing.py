"""What happens to a batch on the device: normalisation, then random erasing (Zhong et al. 2017, arXiv 1708.04896).

Erasing follows timm's "pixel" mode with one box: it comes after normalisation and fills with standard-normal noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ATTEMPTS = 10


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(images / 255 - mean) / std on the images' device, in their memory format.

    Args:
        images: uint8 [B, 3, H, W].
        mean, std: per channel, of values in [0, 1].
        dtype: of the result; the arithmetic is float32.
    """
    offset, factor = _constants(tuple(mean), tuple(std), images.device)
    return images.to(torch.float32).sub_(offset).mul_(factor).to(dtype)


@functools.lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept on the device, since a copy from the host at each step would make it wait."""
    offset = 255 * torch.tensor(mean, dtype=torch.float64)
    factor = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    return tuple(value.float().view(-1, 1, 1).to(device) for value in (offset, factor))  # type: ignore[return-value]


def random_erase(
    images: Tensor,
    *,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    generator: torch.Generator,
) -> Tensor:
    """Overwrite one random box of some images with noise, in place.

    Boxes are drawn on the host and noise on the images' device, so that neither waits for the other.

    Args:
        images: float [B, 3, H, W], normalised; overwritten.
        probability: that an image is erased.
        area: range of the box's share of the image, uniform.
        aspect: range of height / width, log-uniform. Boxes that do not fit are drawn again, up to ten times.
        generator: on the CPU; the noise's own generator is seeded from it.

    Returns:
        `images`.
    """
    boxes = sample_boxes(images.shape, probability, area, aspect, generator)
    noise = torch.Generator(images.device)
    noise.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
    for index, top, left, height, width in boxes:
        images[index, :, top : top + height, left : left + width].normal_(generator=noise)
    return images


def sample_boxes(
    shape: Sequence[int],
    probability: float,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator,
) -> list[list[int]]:
    """Draw the boxes of a batch of `shape` [B, C, H, W].

    Returns:
        [index, top, left, height, width] of each image that is erased.
    """
    batch, _, height, width = shape
    low, high = math.log(aspect[0]), math.log(aspect[1])
    uniform = torch.rand(4, batch, _ATTEMPTS, dtype=torch.float64, generator=generator)
    target = (area[0] + (area[1] - area[0]) * uniform[0]) * height * width
    ratio = torch.exp(low + (high - low) * uniform[1])
    box_height, box_width = torch.round(torch.sqrt(target * ratio)), torch.round(torch.sqrt(target / ratio))
    fits = (box_height < height) & (box_width < width)
    top = torch.floor(uniform[2] * (height - box_height + 1))
    left = torch.floor(uniform[3] * (width - box_width + 1))
    erased = (torch.rand(batch, dtype=torch.float64, generator=generator) < probability) & fits.any(1)
    first = fits.int().argmax(1, keepdim=True)  # argmax of a tie is the first one
    drawn = torch.stack([top, left, box_height, box_width]).gather(2, first.expand(4, -1, 1)).squeeze(2).long()
    return torch.cat([torch.arange(batch)[None], drawn])[:, erased].T.tolist()
