"""From the bytes of an image file to the uint8 tensor that a batch is made of.

Everything stays uint8 and channels-last until the batch is on the device: `restrike.data.erasing` normalises there.
What is random comes from the generator that the caller passes, never from a global or per-worker one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from restrike.data import native
from restrike.data.affine import AffineJitter, Interpolation
from restrike.data.crops import Box, center_window, cut, sample_crop, scale_box
from restrike.data.decode import MAX_PIXELS, DecodeError, decode_reduced, decode_rgb, jpeg_size
from restrike.data.randaugment import IMAGENET_MEAN_COLOR, RandAugment

_PILLOW_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    """Antialiased resize of uint8 [H, W, 3] to [size[0], size[1], 3]; mean error to Pillow's about 72 dB.

    torch works on a channels-last view without copying it, five times faster than Pillow.
    """
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # strides of a channels-last batch, seen as such
    resized = F.interpolate(image, size, mode=interpolation, antialias=True, align_corners=False)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())  # a view as it comes; a copy at 1 x 1


def to_tensor(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] array to [3, H, W] tensor: a view, so in channels-last memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """uint8 [3, H, W] each to [B, 3, H, W] in channels-last memory, which costs one plain copy."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


class TrainTransform:
    """Decode, crop, resize, flip and augment one training image.

    Args:
        image_size: side of the result, or (H, W).
        crop: "random_resized" crops as `sample_crop` says; "resize" takes the whole picture, squashed to size.
        scale: range of the crop's share of the area.
        ratio: range of the crop's width / height.
        interpolation: of the resize and the warps; "random" draws bilinear or bicubic for each.
        hflip: probability of a horizontal flip.
        rand_augment: policy such as `rand-m9-mstd0.5-inc1` (see `RandAugment.parse`), or None.
        fill: RandAugment's colour for what a warp brings in from outside; the data set's mean in 0-255.
        jitter: small affine jitter after the flip, for sets that cropping would spoil.
        native: "auto" decodes only the cropped region where the C extension is built, "on" demands it, "off" never
            does. The pixels are the same.
        dct_scaling: decode at 1/2, 1/4 or 1/8 where the crop is at least that much larger than the result. Faster
            on large photos; pixels move by about as much as between bilinear and bicubic (52 dB).
        max_pixels: larger pictures are refused.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        *,
        crop: Literal["random_resized", "resize"] = "random_resized",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: Literal["random", "bilinear", "bicubic"] = "random",
        hflip: float = 0.5,
        rand_augment: str | None = None,
        fill: tuple[int, int, int] = IMAGENET_MEAN_COLOR,
        jitter: AffineJitter | None = None,
        native: Literal["auto", "on", "off"] = "auto",
        dct_scaling: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        _check_choice("crop", crop, ("random_resized", "resize"))
        _check_choice("interpolation", interpolation, ("random", "bilinear", "bicubic"))
        _check_choice("native", native, ("auto", "on", "off"))
        for name, (low, high) in {"scale": scale, "ratio": ratio}.items():
            if not 0 < low <= high:
                raise ValueError(f"{name}: expected 0 < low <= high, got ({low}, {high})")
        self.size = _as_size(image_size)
        self.crop = crop
        self.scale = scale
        self.ratio = ratio
        self.interpolation = interpolation
        self.hflip = hflip
        self.rand_augment = RandAugment.parse(rand_augment, fill, interpolation) if rand_augment else None
        self.jitter = jitter
        self.native = _resolve_native(native)
        self.dct_scaling = dct_scaling
        self.max_pixels = max_pixels

    def __call__(self, data: bytes, rng: np.random.Generator) -> Tensor:
        """Bytes of an image file to uint8 [3, H, W] (channels-last memory).

        Raises:
            DecodeError: the file is damaged, too large or no image.
        """
        pixels = self._decode_crop(data, rng)
        interpolation = self.interpolation
        if interpolation == "random":
            interpolation = "bicubic" if rng.random() < 0.5 else "bilinear"
        pixels = resize(pixels, self.size, interpolation)
        if rng.random() < self.hflip:
            pixels = cv2.flip(pixels, 1)
        if self.jitter is not None:
            pixels = self.jitter(pixels, rng)
        if self.rand_augment is not None:
            pixels = self.rand_augment(pixels, rng)
        return to_tensor(pixels)

    def _decode_crop(self, data: bytes, rng: np.random.Generator) -> np.ndarray:
        size = jpeg_size(data, self.max_pixels) if self.native or self.dct_scaling else None
        if size is None:
            pixels = decode_rgb(data, max_pixels=self.max_pixels)
            return cut(pixels, self._sample_box(pixels.shape[0], pixels.shape[1], rng))
        box = self._sample_box(*size, rng)
        denominator = self._denominator(box)
        scaled = scale_box(box, denominator, size)
        if self.native:
            try:
                return native.decode_region(data, *scaled, denominator=denominator)
            except native.RegionError:
                pass  # damaged or merely unusual: the tolerant full decode decides
        if denominator > 1:
            try:
                return cut(decode_reduced(data, denominator), scaled)
            except DecodeError:
                pass
        return cut(decode_rgb(data, max_pixels=self.max_pixels), box)

    def _sample_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        if self.crop == "resize":
            return Box(0, 0, height, width)
        return sample_crop(height, width, self.scale, self.ratio, rng)

    def _denominator(self, box: Box) -> int:
        if not self.dct_scaling:
            return 1
        reduction = min(box.height / self.size[0], box.width / self.size[1])
        return max(d for d in (1, 2, 4, 8) if d == 1 or d <= reduction)

    def __repr__(self) -> str:
        steps = [f"crop={self.crop}", f"size={self.size}", f"interpolation={self.interpolation}", f"hflip={self.hflip}"]
        if self.crop == "random_resized":
            steps.insert(1, f"scale={self.scale}, ratio={tuple(round(r, 4) for r in self.ratio)}")
        steps += [repr(step) for step in (self.jitter, self.rand_augment) if step is not None]
        steps.append("region decode in C" if self.native else "full decode")
        return f"TrainTransform({', '.join(steps)})"


class EvalTransform:
    """Decode, resize and centre-crop one evaluation image; pixels equal timm's evaluation transform.

    Args:
        image_size: side of the result, or (H, W).
        crop_pct: the picture is first resized to floor(image_size / crop_pct).
        crop_mode: "center" resizes the shorter side to that, "squash" both sides, "border" the longer one and pads.
        interpolation: of the (Pillow) resize.
        fill: colour of the padding of "border"; the data set's mean in 0-255.
        max_pixels: larger pictures are refused.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        *,
        crop_pct: float = 0.875,
        crop_mode: Literal["center", "squash", "border"] = "center",
        interpolation: Interpolation = "bicubic",
        fill: tuple[int, int, int] = IMAGENET_MEAN_COLOR,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        _check_choice("crop_mode", crop_mode, ("center", "squash", "border"))
        _check_choice("interpolation", interpolation, tuple(_PILLOW_RESAMPLING))
        if crop_pct <= 0:
            raise ValueError(f"crop_pct: expected more than 0, got {crop_pct}")
        self.size = _as_size(image_size)
        self.crop_pct = crop_pct
        self.crop_mode = crop_mode
        self.interpolation = interpolation
        self.fill = fill if crop_mode == "border" else (0, 0, 0)
        self.max_pixels = max_pixels

    def __call__(self, data: bytes) -> Tensor:
        """Bytes of an image file to uint8 [3, H, W] (channels-last memory).

        Raises:
            DecodeError: the file is damaged, too large or no image.
        """
        pixels = decode_rgb(data, max_pixels=self.max_pixels)
        height, width = self._resized(*pixels.shape[:2])
        if height * width > max(self.max_pixels, pixels.shape[0] * pixels.shape[1]):
            raise DecodeError(f"{pixels.shape[0]} x {pixels.shape[1]} pixels: too narrow to be resized")
        if (height, width) != pixels.shape[:2]:
            image = Image.fromarray(pixels).resize((width, height), _PILLOW_RESAMPLING[self.interpolation])
            pixels = np.array(image)
        return to_tensor(center_window(pixels, self.size, self.fill))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Size before the crop."""
        target = tuple(math.floor(side / self.crop_pct) for side in self.size)
        if self.crop_mode == "squash":
            return target[0], target[1]
        if self.crop_mode == "center" and target[0] == target[1]:  # torchvision cuts the long side off here …
            short = min(height, width)
            return int(target[0] * height / short), int(target[0] * width / short)
        choose = max if self.crop_mode == "border" else min  # … and timm rounds it for other targets
        reduction = choose(height / target[0], width / target[1])
        return max(1, round(height / reduction)), max(1, round(width / reduction))

    def __repr__(self) -> str:
        return (
            f"EvalTransform({self.crop_mode} crop, size={self.size}, crop_pct={self.crop_pct}, "
            f"interpolation={self.interpolation})"
        )


def _resolve_native(choice: str) -> bool:
    available = choice != "off" and native.is_available()
    if choice == "on" and not available:
        raise ValueError("native: 'on' needs the extension; run `python -m restrike.data.native.build`, or use 'auto'")
    return available


def _as_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size: expected positive numbers, got {image_size}")
    return height, width


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
