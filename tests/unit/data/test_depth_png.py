"""Our PNGs are plain PNGs to other readers, and other writers' PNGs are read as well; damage never passes."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from restrike.data.decode import DecodeError
from restrike.data.depth_png import (
    _decode_own,
    decode_depth,
    decode_mask,
    decode_mask_pair,
    encode_depth,
    encode_mask_pair,
    encode_png,
)


def noise(seed: int, height: int, width: int, dtype: type) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width), dtype=dtype, endpoint=True)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99), st.integers(1, 70), st.integers(1, 9), st.sampled_from([np.uint8, np.uint16]),
    st.sampled_from(["none", "up"]),
)  # fmt: skip
def test_every_reader_gets_the_same_pixels(seed: int, height: int, width: int, dtype: type, row_filter: str) -> None:
    pixels = noise(seed, height, width, dtype)
    data = encode_png(pixels, row_filter)  # type: ignore[arg-type]
    own = _decode_own(data)
    assert own is not None and own.dtype == dtype
    np.testing.assert_array_equal(own, pixels)
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED), pixels)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.array(image, dtype=dtype), pixels)


@pytest.mark.parametrize("writer", ["opencv", "pillow"])
def test_files_of_other_writers_decode_alike(writer: str) -> None:
    depth = np.random.default_rng(0).random((33, 21)).astype(np.float16)
    depth[3, 4], depth[5, 6], depth[7, 8] = np.inf, np.nan, 0
    if writer == "opencv":
        data = cv2.imencode(".png", depth.view(np.uint16))[1].tobytes()
    else:
        buffer = io.BytesIO()
        Image.fromarray(depth.view(np.uint16)).save(buffer, "PNG")
        data = buffer.getvalue()
    expected = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
    np.testing.assert_array_equal(decode_depth(data), expected)
    np.testing.assert_array_equal(decode_depth(encode_depth(depth)), expected)


def test_one_bit_masks_are_0_and_255() -> None:
    mask = np.random.default_rng(0).random((9, 13)) > 0.5
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    np.testing.assert_array_equal(decode_mask(buffer.getvalue()), mask * np.uint8(255))


def test_negative_depth_and_every_half_float_survive() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    decoded = decode_depth(encode_depth(halves))
    finite = np.isfinite(halves)
    np.testing.assert_array_equal(decoded[finite], halves[finite].astype(np.float32))
    assert (decoded[~finite] == 0).all()


@pytest.mark.parametrize("place", range(20, 80, 7))
def test_damage_anywhere_is_an_error(place: int) -> None:
    data = bytearray(encode_depth(np.random.default_rng(0).random((20, 20))))
    data[place] ^= 0x5A
    try:
        decoded = decode_depth(bytes(data))
    except DecodeError:
        return
    assert decoded.shape == (20, 20) and place in range(29, 33), "only the header's checksum may go unseen"


def test_a_header_that_asks_for_more_than_there_is_does_not_allocate_it() -> None:
    data = encode_png(np.zeros((4, 4), np.uint8))
    huge = data[:16] + (1 << 20).to_bytes(4, "big") + data[20:]
    assert _decode_own(huge) is None


def test_masks_of_odd_height_are_no_pair() -> None:
    with pytest.raises(DecodeError, match="two masks"):
        decode_mask_pair(encode_png(np.zeros((3, 2), np.uint8)))
    foreground = noise(0, 5, 4, np.uint8)
    back = decode_mask_pair(encode_mask_pair(foreground, foreground > 9))
    np.testing.assert_array_equal(back[0], foreground)
    np.testing.assert_array_equal(back[1], foreground > 9)
