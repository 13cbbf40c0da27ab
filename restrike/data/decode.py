"""Bytes of an image file to RGB pixels, as torchvision's ImageFolder would give them.

JPEGs go through libjpeg-turbo (simplejpeg), whose pixels are bit-equal to Pillow's at half the time; whatever it
refuses (other formats under a .jpg name, CMYK, harmless stream errors) goes to Pillow, which decides. EXIF rotation
is not applied. simplejpeg must stay strict: without it a truncated file comes back as a half-grey picture.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 89_478_485  # where Pillow starts to warn of decompression bombs; ImageNet's largest has 19 million
# EPS and the like are left out: Pillow hands them to outside programs.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_JPEG_MAGIC = b"\xff\xd8\xff"

Backend = Literal["auto", "simplejpeg", "pillow"]


class DecodeError(ValueError):
    """An image file that cannot be decoded; the message is the reason. Whoever knows the key adds it."""


def decode_rgb(data: bytes, backend: Backend = "auto", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file of any common format.

    Args:
        data: the file's bytes.
        backend: "auto" tries simplejpeg, then Pillow; the two others take one alone.
        max_pixels: larger pictures are refused before their pixels are allocated.

    Returns:
        uint8 [H, W, 3], contiguous RGB, not rotated by EXIF.

    Raises:
        DecodeError: empty, truncated, too large, or of no known format.
    """
    if backend not in ("auto", "simplejpeg", "pillow"):
        raise ValueError(f"decode backend: expected 'auto', 'simplejpeg' or 'pillow', got {backend!r}")
    if len(data) == 0:
        raise DecodeError("the file is empty (0 bytes)")
    if backend == "pillow":
        return _decode_pillow(data, max_pixels)
    size = jpeg_size(data, max_pixels)
    if size is not None:
        try:
            return simplejpeg.decode_jpeg(data, "RGB", strict=True)
        except ValueError as error:
            if backend == "simplejpeg":
                raise DecodeError(f"simplejpeg: {error}") from None
    elif backend == "simplejpeg":
        raise DecodeError(f"simplejpeg: not an RGB or grey JPEG (it begins with {_begins(data)})")
    return _decode_pillow(data, max_pixels)


def jpeg_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int] | None:
    """(H, W) from the header of an RGB or grey JPEG; None for everything else, CMYK JPEGs included.

    Raises:
        DecodeError: more than `max_pixels` pixels.
    """
    if data[:3] != _JPEG_MAGIC:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace in ("CMYK", "YCCK"):  # simplejpeg's conversion differs from Pillow's by a level
        return None
    _check_pixels(height, width, max_pixels)
    return height, width


def decode_reduced(data: bytes, denominator: int) -> np.ndarray:
    """Decode an RGB or grey JPEG at 1/2, 1/4 or 1/8 of its size, inside the inverse DCT.

    Returns:
        uint8 [ceil(H / denominator), ceil(W / denominator), 3].

    Raises:
        DecodeError: not such a JPEG, or damaged.
    """
    size = jpeg_size(data)
    if size is None:
        raise DecodeError("reduced decoding needs an RGB or grey JPEG")
    height, width = (-(-side // denominator) for side in size)
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=denominator)
    except ValueError as error:
        raise DecodeError(f"simplejpeg: {error}") from None


def _decode_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            _check_pixels(image.height, image.width, max_pixels)
            return np.array(image.convert("RGB"))
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(str(error)) from None
    except Image.UnidentifiedImageError:
        raise DecodeError(f"of no known image format (it begins with {_begins(data)})") from None
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error, IndexError … on damage
        raise DecodeError(f"Pillow: {error}") from error


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DecodeError(f"{height} x {width} pixels are more than max_pixels = {max_pixels:,}")


def _begins(data: bytes) -> str:
    return bytes(data[:8]).hex(" ")
