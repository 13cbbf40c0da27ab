"""CO3D's depth maps and masks as files: 16-bit PNGs whose bits are half floats, 8-bit and 1-bit PNGs.

OpenCV decodes them: it is faster than Pillow by a third, and reading depth is what a multi-view loader spends most on.
"""

from __future__ import annotations

import cv2
import numpy as np

from restrike.data.decode import DecodeError

_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 6]  # of shards that are read for years; decoding costs the same at any level


def decode_depth(data: bytes, scale_adjustment: float = 1.0) -> np.ndarray:
    """A depth map in the file's units.

    Args:
        data: a 16-bit grey PNG; each pixel's bits are an IEEE half float (CO3D's format).
        scale_adjustment: CO3D's factor, 1 in all of v2; VGGT and DiffusionSfM ignore it.

    Returns:
        float32 [H, W] z-depth, 0 where unknown; infinite and NaN pixels are unknown.

    Raises:
        DecodeError: truncated, or no 16-bit grey PNG.
    """
    bits = _decode_png(data, "depth")
    if bits.dtype != np.uint16 or bits.ndim != 2:
        raise DecodeError(f"depth: expected a 16-bit grey PNG, got {bits.dtype} {list(bits.shape)}")
    depth = bits.view(np.float16).astype(np.float32) * np.float32(scale_adjustment)
    depth[~np.isfinite(depth)] = 0
    return depth


def encode_depth(depth: np.ndarray) -> bytes:
    """Inverse of `decode_depth`: float [H, W] to half-float bits in a 16-bit PNG."""
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(depth, dtype=np.float16)
    return encode_png(half.view(np.uint16))


def decode_mask(data: bytes) -> np.ndarray:
    """uint8 [H, W] of a mask PNG: 255 = certain. 1-bit files come as 0 and 255.

    Raises:
        DecodeError: truncated, or no 8-bit or 1-bit PNG.
    """
    mask = _decode_png(data, "mask")
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise DecodeError(f"mask: expected an 8-bit or 1-bit grey PNG, got {mask.dtype} {list(mask.shape)}")
    return mask


def decode_mask_pair(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The foreground (uint8 [H, W]) and depth mask (bool [H, W]) that `encode_mask_pair` packed.

    Raises:
        DecodeError: another file.
    """
    pair = decode_mask(data)
    if pair.shape[0] % 2:
        raise DecodeError(f"mask: expected two masks of equal height, got {list(pair.shape)}")
    foreground, depth_mask = np.split(pair, 2)
    return foreground, depth_mask > 128


def encode_mask_pair(foreground: np.ndarray, depth_mask: np.ndarray) -> bytes:
    """Both masks, uint8 [H, W] and bool [H, W], one above the other in a grey PNG: one read and one decode for the two,
    a third faster than as two channels, since PNG has no two channels that OpenCV reads without a colour conversion."""
    return encode_png(np.concatenate([foreground, 255 * depth_mask.astype(np.uint8)]))


def encode_png(pixels: np.ndarray) -> bytes:
    """Pixels [H, W], uint8 or uint16, as a PNG."""
    done, data = cv2.imencode(".png", pixels, _PNG)
    assert done, "PNG holds every 8-bit and 16-bit array"
    return data.tobytes()


def _decode_png(data: bytes, what: str) -> np.ndarray:
    if not data.startswith(b"\x89PNG"):
        raise DecodeError(f"{what}: not a PNG file ({len(data)} bytes)")
    if b"IEND" not in data[-16:]:  # OpenCV returns what it could read of a truncated file, the rest black
        raise DecodeError(f"{what}: truncated PNG ({len(data)} bytes without the end mark)")
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise DecodeError(f"{what}: damaged PNG ({len(data)} bytes)")
    return pixels
