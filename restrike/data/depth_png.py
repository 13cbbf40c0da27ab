"""CO3D's depth maps and masks as files: 16-bit PNGs whose bits are half floats, 8-bit and 1-bit PNGs.

Reading depth is what a multi-view loader spends most on. Our own files hold one IDAT chunk and one kind of row filter,
so that the pixels are inflated in one call: two to five times faster than by libpng, which inflates row by row. They
are plain PNGs to every other reader; other PNGs, such as the data set's own, are decoded by OpenCV.
"""

from __future__ import annotations

import struct
import zlib
from typing import Literal

import cv2
import numpy as np
import torch

from restrike.data.decode import DecodeError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LEVEL = 6  # of shards that are read for years; inflating costs the same at any level
_FILTERS = {"none": 0, "up": 2}
_INFINITE = 0x7C00  # exponent bits of a half float that is infinite or NaN
_BLOCK = 32  # rows that are summed side by side


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
    unknown = (bits & _INFINITE) == _INFINITE
    # torch widens half floats in vector instructions, numpy 20 times slower
    depth = torch.from_numpy(bits.view(np.float16)).float().numpy()
    depth[unknown] = 0
    return depth if scale_adjustment == 1 else depth * np.float32(scale_adjustment)


def encode_depth(depth: np.ndarray) -> bytes:
    """Inverse of `decode_depth`: float [H, W] to half-float bits in a 16-bit PNG."""
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(depth, dtype=np.float16)
    return encode_png(half.view(np.uint16), "up")


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
    """Both masks, uint8 [H, W] and bool [H, W], one above the other in a grey PNG: one read and decode for the two."""
    return encode_png(np.concatenate([foreground, 255 * depth_mask.astype(np.uint8)]))


def encode_png(pixels: np.ndarray, row_filter: Literal["none", "up"] = "none") -> bytes:
    """Pixels [H, W], uint8 or uint16, as a grey PNG; "up" (row differences) is smaller for depth, "none" for masks."""
    height, width = pixels.shape
    bits = 8 * pixels.itemsize
    rows = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder(">")).view(np.uint8).reshape(height, -1)
    if row_filter == "up":
        rows = np.concatenate([rows[:1], rows[1:] - rows[:-1]])
    marks = np.full((height, 1), _FILTERS[row_filter], dtype=np.uint8)
    content = zlib.compress(np.concatenate([marks, rows], axis=1).tobytes(), _LEVEL)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _decode_png(data: bytes, what: str) -> np.ndarray:
    if not data.startswith(b"\x89PNG"):
        raise DecodeError(f"{what}: not a PNG file ({len(data)} bytes)")
    if b"IEND" not in data[-16:]:  # OpenCV returns what it could read of a truncated file, the rest black
        raise DecodeError(f"{what}: truncated PNG ({len(data)} bytes without the end mark)")
    if (own := _decode_own(data)) is not None:
        return own
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise DecodeError(f"{what}: damaged PNG ({len(data)} bytes)")
    return pixels


def _decode_own(data: bytes) -> np.ndarray | None:
    """A file of `encode_png`; None for every other PNG, and for a damaged one."""
    if data[12:16] != b"IHDR" or data[37:41] != b"IDAT" or len(data) < 57:
        return None
    width, height, bits, *rest = struct.unpack(">IIBBBBB", data[16:29])
    (length,) = struct.unpack(">I", data[33:37])
    if bits not in (8, 16) or any(rest) or len(data) != 57 + length or data[-8:-4] != b"IEND":
        return None
    stride = 1 + width * bits // 8
    try:
        raw = zlib.decompressobj().decompress(memoryview(data)[41 : 41 + length], height * stride + 1)
    except zlib.error:
        return None
    if len(raw) != height * stride:
        return None
    rows = np.frombuffer(raw, np.uint8).reshape(height, stride)
    marks, rows = rows[:, 0], rows[:, 1:]
    if (marks == _FILTERS["up"]).all():
        rows = _sum_rows(rows)
    elif marks.any():
        return None
    if bits == 8:
        return np.ascontiguousarray(rows)
    return np.ascontiguousarray(rows).view(">u2").astype(np.uint16)


def _sum_rows(rows: np.ndarray) -> np.ndarray:
    """Running sums over axis 0, modulo 256: within blocks of rows side by side, then block by block."""
    height, width = rows.shape
    blocks = -(-height // _BLOCK)
    sums = np.zeros((blocks, _BLOCK, width), dtype=np.uint8)
    sums.reshape(-1, width)[:height] = rows
    for row in range(1, _BLOCK):
        sums[:, row] += sums[:, row - 1]
    for block in range(1, blocks):
        sums[block] += sums[block - 1, -1]
    return sums.reshape(-1, width)[:height]
