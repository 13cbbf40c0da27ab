"""The C region decoder: same pixels as a full decode, errors in place of crashes, and a fall-back without it."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from restrike.data import native
from restrike.data.decode import DecodeError, decode_reduced, decode_rgb
from restrike.data.native import build as native_build
from restrike.data.transforms import TrainTransform

JPEGS = Path(__file__).parents[2] / "data" / "jpegs"
RGB_JPEGS = [
    "coffee_500x333_q90_420",
    "astronaut_375x500_q90_444",
    "chelsea_451x300_q92_422",
    "rocket_501x335_q85_progressive",
    "hubble_500x375_q80_restart",
    "chelsea_225x150_gray",
    "rocket_17x13_tiny",
]
FUZZ = """
import sys, numpy as np
from restrike.data import native
data = open(sys.argv[1], "rb").read()
rng = np.random.default_rng(int(sys.argv[2]))
outcomes = {"decoded": 0, "refused": 0}
for case in range(400):
    bad = bytearray(data)
    for position in rng.integers(0, len(bad), rng.integers(1, 6)):
        bad[position] ^= 1 << rng.integers(8)
    if case % 2:
        del bad[rng.integers(len(bad)):]
        bad += b"\\xff\\xd9"  # else the end marker's check would refuse it before libjpeg sees it
    try:
        pixels = native.decode_region(bytes(bad), 3, 2, 9, 11)
        assert pixels.shape == (9, 11, 3)
        outcomes["decoded"] += 1
    except native.RegionError:
        outcomes["refused"] += 1
print(outcomes["decoded"], outcomes["refused"])
"""


def read(name: str) -> bytes:
    return (JPEGS / f"{name}.jpg").read_bytes()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The extension, built into a cache folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        native.load.cache_clear()
        try:
            yield native_build.build()
        except native_build.BuildError as error:
            pytest.skip(f"no C compiler or no libjpeg headers: {error}")
        finally:
            native.load.cache_clear()


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.mark.parametrize("name", RGB_JPEGS)
def test_a_region_is_bit_equal_to_the_full_decode(library: Path, name: str) -> None:
    full = decode_rgb(read(name))
    height, width = full.shape[:2]
    rng = np.random.default_rng(0)
    boxes = [(0, 0, height, width), (height - 1, width - 1, 1, 1)]
    for _ in range(40):
        crop_height, crop_width = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        top, left = int(rng.integers(height - crop_height + 1)), int(rng.integers(width - crop_width + 1))
        boxes.append((top, left, crop_height, crop_width))
    for top, left, crop_height, crop_width in boxes:
        region = native.decode_region(read(name), top, left, crop_height, crop_width)
        np.testing.assert_array_equal(region, full[top : top + crop_height, left : left + crop_width])


@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_a_region_of_a_reduced_picture_is_bit_equal_to_the_reduced_decode(library: Path, denominator: int) -> None:
    data = read("hubble_1000x872_q75")
    region = native.decode_region(data, 31, 17, 60, 80, denominator=denominator)
    np.testing.assert_array_equal(region, decode_reduced(data, denominator)[31:91, 17:97])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("corrupt_empty", "end marker"),
        ("corrupt_truncated_60pct", "end marker"),
        ("coffee_300x200_cmyk", "(?i)color"),
        ("astronaut_64x64_png_content_named", "end marker"),
    ],
)
def test_unusual_files_are_refused_with_a_reason(library: Path, name: str, reason: str) -> None:
    with pytest.raises(native.RegionError, match=reason):
        native.decode_region(read(name), 0, 0, 150, 60 if "png" in name else 200)


def test_a_file_with_stream_errors_gives_the_pixels_of_the_tolerant_decode_or_is_refused(library: Path) -> None:
    full = decode_rgb(read("corrupt_bitflips"))
    for top in range(0, 301, 50):
        try:
            region = native.decode_region(read("corrupt_bitflips"), top, 20, 30, 400)
        except native.RegionError:
            continue
        np.testing.assert_array_equal(region, full[top : top + 30, 20:420])


@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 14, 5), (0, 0, 5, 18), (9, 9, 5, 5), (0, 0, 0, 5)]
)
def test_a_rectangle_outside_the_picture_is_refused(library: Path, box: tuple[int, int, int, int]) -> None:
    with pytest.raises(native.RegionError, match="not inside|empty rectangle"):
        native.decode_region(read("rocket_17x13_tiny"), *box)


@pytest.mark.parametrize("name", ["rocket_17x13_tiny", "rocket_501x335_q85_progressive"])
def test_damaged_streams_never_crash_the_process(library: Path, name: str) -> None:
    command = [sys.executable, "-c", FUZZ, str(JPEGS / f"{name}.jpg"), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    decoded, refused = map(int, done.stdout.split())
    assert decoded + refused == 400 and refused > 100


@pytest.mark.parametrize("rand_augment", [None, "rand-m9-mstd0.5-inc1"])
@pytest.mark.parametrize("name", [*RGB_JPEGS, "coffee_300x200_cmyk", "astronaut_64x64_png_content_named"])
def test_training_images_do_not_depend_on_the_extension(library: Path, name: str, rand_augment: str | None) -> None:
    with_it = TrainTransform(32, native="on", rand_augment=rand_augment)
    without = TrainTransform(32, native="off", rand_augment=rand_augment)
    for seed in range(5):
        ours, plain = (t(read(name), np.random.default_rng(seed)) for t in (with_it, without))
        assert torch.equal(ours, plain)


def test_a_truncated_file_fails_even_where_the_crop_is_whole(library: Path) -> None:
    transform = TrainTransform(32, native="on", scale=(0.01, 0.02))
    for seed in range(8):
        with pytest.raises(DecodeError):
            transform(read("corrupt_truncated_60pct"), np.random.default_rng(seed))


def test_without_the_extension_auto_decodes_in_full_and_says_so_once(
    no_library: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="restrike.data.native"):
        transform = TrainTransform(32, native="auto")
        TrainTransform(32, native="auto")
    assert len(caplog.records) == 1 and "restrike.data.native.build" in caplog.text
    assert transform(read("rocket_17x13_tiny"), np.random.default_rng(0)).shape == (3, 32, 32)


def test_without_the_extension_on_is_an_error_that_tells_how_to_build_it(no_library: None) -> None:
    with pytest.raises(ValueError, match="python -m restrike.data.native.build"):
        TrainTransform(32, native="on")


def test_a_library_of_another_machine_is_passed_over(no_library: None) -> None:
    path = native_build.extension_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    assert not native.is_available()


def test_a_missing_compiler_is_named(no_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(native_build.BuildError, match="no-such-compiler.*apt-get install gcc"):
        native_build.build()
    assert native_build.main() == 1
