"""Colour operations of RandAugment on arrays; `pixels` is uint8 [H, W, 3] RGB everywhere, and is never written to.

They reproduce Pillow's ImageOps and ImageEnhance: bit for bit where a look-up table does it, within two levels
(`color`) and one (`sharpness`), at a fraction of the time.
"""

from __future__ import annotations

import cv2
import numpy as np

_LEVELS = np.arange(256)
_LUMA = np.array([19595, 38470, 7471], np.float32) / 65536  # Pillow's 16-bit weights of R, G, B; exact in float32
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # ImageFilter.SMOOTH
# cv2 rounds where Pillow cuts off: subtract half, and a hair less so that whole numbers stay what they are.
_TRUNCATE = -0.499


def auto_contrast(pixels: np.ndarray) -> np.ndarray:
    """Stretch each channel to the full range."""
    rows = pixels.shape[0]
    darkest = pixels.reshape(rows, -1).min(0).reshape(-1, 3).min(0).tolist()  # two steps: the first one vectorises
    brightest = pixels.reshape(rows, -1).max(0).reshape(-1, 3).max(0).tolist()
    return _apply_tables(pixels, [_stretch(low, high) for low, high in zip(darkest, brightest, strict=True)])


def equalize(pixels: np.ndarray) -> np.ndarray:
    """Flatten each channel's histogram."""
    counts = [cv2.calcHist([pixels], [channel], None, [256], [0, 256]).ravel() for channel in range(3)]
    return _apply_tables(pixels, [_equalizing(count.astype(np.int64)) for count in counts])


def invert(pixels: np.ndarray) -> np.ndarray:
    """255 - value."""
    return np.invert(pixels)


def posterize(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Keep the highest `bits` of each value; 0 gives black, as in Pillow before version 13 (which refuses it)."""
    return np.bitwise_and(pixels, np.uint8(256 - (1 << (8 - bits))))


def solarize(pixels: np.ndarray, threshold: int) -> np.ndarray:
    """Invert values from `threshold` up."""
    return cv2.LUT(pixels, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS).astype(np.uint8))


def solarize_add(pixels: np.ndarray, add: int) -> np.ndarray:
    """Add to values under 128."""
    return cv2.LUT(pixels, np.where(_LEVELS < 128, np.minimum(_LEVELS + add, 255), _LEVELS).astype(np.uint8))


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black; `factor` 1 changes nothing."""
    return cv2.LUT(pixels, _blend_table(0, factor))


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean grey; `factor` 1 changes nothing."""
    luma = (pixels.reshape(-1, 3).astype(np.float32) @ _LUMA + np.float32(0.5)).astype(np.uint8)
    return cv2.LUT(pixels, _blend_table(int(luma.mean() + 0.5), factor))


def color(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey picture; `factor` 1 changes nothing, 0 is grey. Within two levels of Pillow."""
    matrix = factor * np.eye(3, 4, dtype=np.float32)
    matrix[:, :3] += (1 - factor) * _LUMA
    matrix[:, 3] = _TRUNCATE
    return cv2.transform(pixels, matrix)


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with a smoothed picture; `factor` 1 changes nothing. Within one level of Pillow."""
    smooth = cv2.filter2D(pixels, -1, _SMOOTH)
    smooth[[0, -1]], smooth[:, [0, -1]] = pixels[[0, -1]], pixels[:, [0, -1]]  # Pillow leaves the frame as it is
    return cv2.addWeighted(pixels, factor, smooth, 1 - factor, _TRUNCATE)


def _stretch(low: int, high: int) -> np.ndarray:
    if high <= low:
        return _LEVELS.astype(np.uint8)
    scale = 255.0 / (high - low)
    return (_LEVELS * scale + -low * scale).astype(np.int64).clip(0, 255).astype(np.uint8)


def _equalizing(count: np.ndarray) -> np.ndarray:
    filled = count[count > 0]
    step = int(filled[:-1].sum()) // 255
    if step == 0:
        return _LEVELS.astype(np.uint8)
    below = np.cumsum(count) - count
    return ((step // 2 + below) // step).clip(0, 255).astype(np.uint8)


def _blend_table(background: int, factor: float) -> np.ndarray:
    """background + factor * (value - background) in float32, cut off, as Pillow's blend computes it."""
    values = np.float32(background) + np.float32(factor) * (_LEVELS - background).astype(np.float32)
    return values.clip(0, 255).astype(np.uint8)


def _apply_tables(pixels: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
    return cv2.LUT(pixels, np.stack(tables, -1)[None])
