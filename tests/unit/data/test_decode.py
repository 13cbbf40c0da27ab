"""What each kind of file in `tests/data/jpegs` decodes to, or why it does not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from restrike.data.decode import DecodeError, decode_reduced, decode_rgb, jpeg_size

JPEGS = Path(__file__).parents[2] / "data" / "jpegs"
GOOD_JPEGS = [
    "coffee_500x333_q90_420",
    "astronaut_375x500_q90_444",
    "chelsea_451x300_q92_422",
    "rocket_501x335_q85_progressive",
    "hubble_500x375_q80_restart",
    "hubble_1000x872_q75",
    "chelsea_225x150_gray",
    "astronaut_256x192_exif_orientation6",
    "rocket_17x13_tiny",
]


def read(name: str) -> bytes:
    return (JPEGS / f"{name}.jpg").read_bytes()


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize("name", GOOD_JPEGS)
def test_simplejpeg_gives_the_pixels_of_pillow(name: str) -> None:
    pixels = decode_rgb(read(name), backend="simplejpeg")
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, pillow(read(name)))


@pytest.mark.parametrize("name", ["coffee_300x200_cmyk", "astronaut_64x64_png_content_named", "corrupt_bitflips"])
def test_what_simplejpeg_refuses_comes_from_pillow(name: str) -> None:
    with pytest.raises(DecodeError, match="simplejpeg"):
        decode_rgb(read(name), backend="simplejpeg")
    np.testing.assert_array_equal(decode_rgb(read(name)), pillow(read(name)))


def test_exif_rotation_is_not_applied() -> None:
    assert decode_rgb(read("astronaut_256x192_exif_orientation6")).shape == (192, 256, 3)


@pytest.mark.parametrize("backend", ["auto", "simplejpeg", "pillow"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("corrupt_truncated_60pct", "(?i)truncated|premature end"), ("corrupt_empty", "empty")],
)
def test_damaged_files_raise_with_a_reason(name: str, reason: str, backend: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode_rgb(read(name), backend=backend)  # type: ignore[arg-type]


def test_bytes_that_are_no_image_are_named_by_their_beginning() -> None:
    with pytest.raises(DecodeError, match="no known image format.*64 65 66"):
        decode_rgb(b"def f(): pass")


@pytest.mark.parametrize(
    ("mode", "format"), [("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP"), ("1", "BMP")]
)
def test_other_formats_and_modes_become_rgb(mode: str, format: str) -> None:
    image = Image.fromarray(decode_rgb(read("rocket_17x13_tiny"))).convert(mode)
    pixels = decode_rgb(encode(image, format))
    assert pixels.shape == (13, 17, 3) and pixels.flags.writeable


def test_formats_that_run_outside_programs_are_refused() -> None:
    with pytest.raises(DecodeError, match="no known image format"):
        decode_rgb(encode(Image.new("RGB", (8, 8)), "EPS"))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_before_they_are_decoded(format: str) -> None:
    data = encode(Image.new("RGB", (64, 48)), format)
    assert decode_rgb(data, max_pixels=64 * 48).shape == (48, 64, 3)
    with pytest.raises(DecodeError, match=r"48 x 64 pixels are more than max_pixels = 3,071"):
        decode_rgb(data, max_pixels=64 * 48 - 1)


def test_a_decompression_bomb_is_refused() -> None:
    bomb = bytearray(encode(Image.new("L", (8, 8)), "PNG"))
    bomb[16:24] = (40_000).to_bytes(4, "big") * 2  # width and height of the header chunk
    with pytest.raises(DecodeError):
        decode_rgb(bytes(bomb))


def test_an_unknown_backend_is_a_users_error() -> None:
    with pytest.raises(ValueError, match="'auto', 'simplejpeg' or 'pillow', got 'cv2'") as error:
        decode_rgb(read("rocket_17x13_tiny"), backend="cv2")  # type: ignore[arg-type]
    assert not isinstance(error.value, DecodeError)


@pytest.mark.parametrize("name", [*GOOD_JPEGS, "coffee_300x200_cmyk", "astronaut_64x64_png_content_named"])
def test_size_in_the_header_is_that_of_the_pixels(name: str) -> None:
    size = jpeg_size(read(name))
    is_plain = name in GOOD_JPEGS
    assert size == (decode_rgb(read(name)).shape[:2] if is_plain else None)


@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_reduced_decoding_resembles_a_resized_picture(denominator: int) -> None:
    data = read("hubble_1000x872_q75")
    reduced = decode_reduced(data, denominator)
    assert reduced.shape == (872 // denominator, 1000 // denominator, 3)
    box = np.asarray(Image.fromarray(pillow(data)).reduce(denominator))
    assert np.abs(reduced.astype(int) - box).mean() < 2
