"""Colour jitter over the views of a scene: one draw for all of them, or one a view.

CUT3R jitters uint8 pictures with one draw a sequence; VGGT jitters float images, mostly with one draw a scene (with
probability 0.7), adds grey pictures and, if asked for, a Gaussian blur. The arithmetic is torchvision's. Draws follow
the order of torchvision's ColorJitter from a torch generator: order of the four adjustments, then the four factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

_IDENTITY = (1.0, 1.0, 1.0, 0.0)


class Adjustments(NamedTuple):
    """Order (0 brightness, 1 contrast, 2 saturation, 3 hue), their factors (hue: turns), grey, blur's σ or None."""

    order: tuple[int, ...] = ()
    factors: tuple[float, float, float, float] = _IDENTITY
    gray: bool = False
    blur: float | None = None


@dataclass(frozen=True)
class ColorJitter:
    """What may happen to colours.

    Attributes:
        brightness, contrast, saturation: factor uniform in [1 - x, 1 + x].
        hue: turns uniform in [-x, x].
        prob: of the jitter.
        gray_prob: of a grey picture.
        blur_prob: of a Gaussian blur, 5 x 5, σ uniform in [0.1, 1].
        same_prob: of one draw for all views of a scene; the release's argument (VGGT's `cojitter_ratio` 0.3) suggests
            the opposite of what its code does, which is 1 - 0.3.
        as_uint8: through 8-bit pictures with Pillow's arithmetic (CUT3R); else on floats.
    """

    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.1
    prob: float = 1.0
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    same_prob: float = 1.0
    as_uint8: bool = False

    def draw(self, generator: torch.Generator) -> Adjustments:
        """One draw, as torchvision's RandomApply([ColorJitter]), RandomGrayscale and RandomApply([GaussianBlur])."""
        order: tuple[int, ...] = ()
        factors = _IDENTITY
        if self.prob >= 1 or float(torch.rand(1, generator=generator)) <= self.prob:
            order = tuple(torch.randperm(4, generator=generator).tolist())
            spans = (self.brightness, self.contrast, self.saturation)
            b, c, s = (_uniform(max(0.0, 1 - x), 1 + x, generator) for x in spans)
            factors = (b, c, s, _uniform(-self.hue, self.hue, generator))
        gray = self.gray_prob > 0 and float(torch.rand(1, generator=generator)) < self.gray_prob
        is_blurred = self.blur_prob > 0 and float(torch.rand(1, generator=generator)) <= self.blur_prob
        return Adjustments(order, factors, gray, _uniform(0.1, 1.0, generator) if is_blurred else None)

    def __call__(self, images: Tensor, is_same: bool, generator: torch.Generator) -> Tensor:
        """Jitter [V, 3, H, W]: uint8 where `as_uint8`, else float in [0, 1]; the same type comes back."""
        if is_same:
            return self.apply(images, self.draw(generator))
        return torch.cat([self.apply(image[None], self.draw(generator)) for image in images])

    def apply(self, images: Tensor, adjustments: Adjustments) -> Tensor:
        """Images [V, 3, H, W] after given adjustments."""
        if self.as_uint8:
            return torch.stack([_adjust_picture(image, adjustments) for image in images])
        functions = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for which in adjustments.order:
            images = functions[which](images, adjustments.factors[which])
        if adjustments.gray:
            images = F.rgb_to_grayscale(images, num_output_channels=3)
        if adjustments.blur is not None:
            images = F.gaussian_blur(images, [5, 5], [adjustments.blur, adjustments.blur])
        return images


def _adjust_picture(image: Tensor, adjustments: Adjustments) -> Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    functions = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for which in adjustments.order:
        picture = functions[which](picture, adjustments.factors[which])
    if adjustments.gray:
        picture = F.rgb_to_grayscale(picture, num_output_channels=3)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return float(torch.empty(1).uniform_(low, high, generator=generator))
