"""Optional C extension: decode only that rectangle of a JPEG which a random crop keeps.

Pixels are those of a full decode, so nothing but speed depends on it. Build it once with
`python -m restrike.data.native.build`; where it is missing the full decode takes its place.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import numpy as np

_MESSAGE_BYTES = 200  # libjpeg's JMSG_LENGTH_MAX
_log = logging.getLogger(__name__)


class RegionError(ValueError):
    """The rectangle could not be decoded this way; a full decode may still succeed."""


@functools.cache
def load() -> Any | None:
    """The extension's decode function, or None (and one info line) where it has not been built."""
    from restrike.data.native.build import extension_path  # here, so that `python -m …native.build` imports it once

    path = extension_path()
    try:
        function = ctypes.CDLL(str(path)).restrike_decode_region
    except OSError as error:
        reason = error if path.exists() else "not built"
        _log.info("JPEG region decoding is off (%s); `python -m restrike.data.native.build` turns it on", reason)
        return None
    function.argtypes = [ctypes.c_char_p, ctypes.c_ulong, *[ctypes.c_int] * 5, ctypes.c_void_p, ctypes.c_char_p]
    function.restype = ctypes.c_int
    return function


def is_available() -> bool:
    """Whether `decode_region` can be called."""
    return load() is not None


def decode_region(data: bytes, top: int, left: int, height: int, width: int, denominator: int = 1) -> np.ndarray:
    """Decode rows `top … top + height` and columns `left … left + width` of an RGB or grey JPEG.

    Args:
        data: the file's bytes.
        top, left, height, width: the rectangle, pixels of the picture after scaling.
        denominator: 1, 2, 4 or 8: decode at that fraction of the size.

    Returns:
        uint8 [height, width, 3], bit-equal to the same rectangle of a full decode at that scale.

    Raises:
        RegionError: anything unusual in the stream (CMYK, any libjpeg warning, no end marker), or a rectangle that
            is not inside the picture.
    """
    decode = load()
    if decode is None:
        raise RegionError("the extension is not built; run `python -m restrike.data.native.build`")
    # A truncated file may be whole as far as the rectangle reaches. It must not pass here and fail elsewhere.
    if data[-2:] != b"\xff\xd9":
        raise RegionError("the file does not end with a JPEG end marker")
    if height < 1 or width < 1:
        raise RegionError(f"an empty rectangle of {height} x {width} pixels")
    pixels = np.empty((height, width, 3), np.uint8)
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if decode(data, len(data), denominator, top, left, height, width, pixels.ctypes.data, message) != 0:
        raise RegionError(message.value.decode("ascii", "replace"))
    return pixels
