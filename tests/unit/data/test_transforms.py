"""Training and evaluation transforms: sampling as timm's, pixels near or equal to Pillow's, nothing hidden."""

from __future__ import annotations

import io
import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import transforms_imagenet_eval

from restrike.data.affine import AffineJitter, rotate_scale, warp
from restrike.data.crops import Box, sample_crop, scale_box
from restrike.data.decode import DecodeError, decode_rgb
from restrike.data.transforms import EvalTransform, TrainTransform, resize, stack_images, to_tensor

JPEGS = Path(__file__).parents[2] / "data" / "jpegs"
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def read(name: str) -> bytes:
    return (JPEGS / f"{name}.jpg").read_bytes()


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


@pytest.fixture
def plain() -> TrainTransform:
    """Crop and resize alone."""
    return TrainTransform(48, hflip=0, native="off", interpolation="bicubic")


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 90), (3, 500), (224, 224)])
def test_crops_are_distributed_as_timms(height: int, width: int) -> None:
    image, rng, draws = Image.new("RGB", (width, height)), np.random.default_rng(0), 3000
    random.seed(0)
    theirs = np.array([RandomResizedCropAndInterpolation.get_params(image, SCALE, RATIO) for _ in range(draws)])
    ours = np.array([sample_crop(height, width, SCALE, RATIO, rng) for _ in range(draws)])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    for column, side in zip(range(4), (height, width, height, width), strict=True):
        for statistic in (np.mean, np.std):
            assert statistic(ours[:, column]) == pytest.approx(statistic(theirs[:, column]), abs=0.03 * side)


def test_a_picture_of_one_pixel_gives_that_pixel() -> None:
    rng = np.random.default_rng(0)  # timm draws empty crops here, and then fails to resize them
    assert {sample_crop(1, 1, SCALE, RATIO, rng) for _ in range(100)} == {Box(0, 0, 1, 1)}


def test_a_picture_too_narrow_for_any_crop_gives_the_largest_centred_one() -> None:
    rng = np.random.default_rng(0)
    assert sample_crop(1000, 10, SCALE, RATIO, rng) == Box(493, 0, 13, 10)
    assert sample_crop(10, 1000, SCALE, RATIO, rng) == Box(0, 493, 10, 13)


def test_a_reduced_box_stays_inside_the_reduced_picture() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = (int(rng.integers(1, 50)), int(rng.integers(1, 50)))
        box = sample_crop(*size, SCALE, RATIO, rng)
        for denominator in (1, 2, 4, 8):
            top, left, height, width = scale_box(box, denominator, size)
            assert min(top, left) >= 0 and min(height, width) >= 1
            assert top + height <= math.ceil(size[0] / denominator)
            assert left + width <= math.ceil(size[1] / denominator)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(224, 224), (96, 160), (512, 512)])
def test_resize_is_that_of_pillow_but_for_rounding(size: tuple[int, int], interpolation: str) -> None:
    pixels = decode_rgb(read("coffee_500x333_q90_420"))[20:320, 100:390]
    ours = resize(pixels, size, interpolation)  # type: ignore[arg-type]
    filter = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    theirs = np.asarray(Image.fromarray(pixels).resize(size[::-1], filter))
    assert ours.shape == (*size, 3) and ours.flags.c_contiguous
    assert psnr(ours, theirs) > 55


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (8, 8)])
def test_resize_takes_any_shape(shape: tuple[int, int], size: tuple[int, int]) -> None:
    pixels = np.full((*shape, 3), (9, 99, 199), np.uint8)
    np.testing.assert_array_equal(resize(pixels, size, "bicubic"), np.full((*size, 3), (9, 99, 199), np.uint8))


def test_the_whole_recipe_gives_uint8_of_the_asked_size() -> None:
    transform = TrainTransform((64, 48), rand_augment="rand-m9-mstd0.5-inc1")
    for name in ("coffee_500x333_q90_420", "chelsea_225x150_gray", "coffee_300x200_cmyk", "rocket_17x13_tiny"):
        image = transform(read(name), np.random.default_rng(0))
        assert image.dtype == torch.uint8 and image.shape == (3, 64, 48)


def test_equal_generators_give_equal_images_and_others_do_not() -> None:
    transform, data = TrainTransform(32, rand_augment="rand-m9-mstd0.5-inc1"), read("coffee_500x333_q90_420")
    first, again, other = (transform(data, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_global_generators_neither_matter_nor_move() -> None:
    transform, data = TrainTransform(32, rand_augment="rand-m9-mstd0.5-inc1"), read("coffee_500x333_q90_420")
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    transform(data, np.random.default_rng(0))
    assert before[0] == random.getstate() and before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())


def test_a_pickled_transform_gives_the_same_images() -> None:
    transform = TrainTransform(32, rand_augment="rand-m9-mstd0.5-inc1", jitter=AffineJitter())
    copy = pickle.loads(pickle.dumps(transform))
    images = [t(read("coffee_500x333_q90_420"), np.random.default_rng(0)) for t in (transform, copy)]
    assert torch.equal(*images)


def test_flips_come_with_their_probability(plain: TrainTransform) -> None:
    ramp = png(np.repeat(np.arange(0, 200, 4, dtype=np.uint8)[None, :, None], 50, 0).repeat(3, 2))
    for probability in (0.0, 0.5, 1.0):
        transform = TrainTransform(8, crop="resize", hflip=probability)
        images = [transform(ramp, np.random.default_rng(seed)) for seed in range(400)]
        flipped = np.mean([bool(image[0, 0, 0] > image[0, 0, -1]) for image in images])
        assert flipped == pytest.approx(probability, abs=0.08 if probability == 0.5 else 0)


def test_random_interpolation_draws_both_kinds_evenly() -> None:
    checker = png(np.indices((16, 16)).sum(0).astype(np.uint8)[..., None].repeat(3, 2) % 2 * 255)
    transform = TrainTransform(40, crop="resize", hflip=0, interpolation="random")
    seen = [transform(checker, np.random.default_rng(seed)).numpy().tobytes() for seed in range(300)]
    fixed = [
        TrainTransform(40, crop="resize", hflip=0, interpolation=kind)(checker, np.random.default_rng(0))
        for kind in ("bilinear", "bicubic")
    ]
    counts = [seen.count(image.numpy().tobytes()) for image in fixed]
    assert sum(counts) == 300 and min(counts) > 110


def test_reduced_decoding_keeps_the_picture(plain: TrainTransform) -> None:
    reduced = TrainTransform(48, hflip=0, native="off", interpolation="bicubic", dct_scaling=True)
    data = read("hubble_1000x872_q75")
    for seed in range(6):
        full, quick = (t(data, np.random.default_rng(seed)).numpy() for t in (plain, reduced))
        assert not np.array_equal(full, quick)
        assert psnr(full, quick) > 30


def test_damaged_files_raise_decode_errors(plain: TrainTransform) -> None:
    for name in ("corrupt_truncated_60pct", "corrupt_empty"):
        with pytest.raises(DecodeError):
            plain(read(name), np.random.default_rng(0))
        with pytest.raises(DecodeError):
            EvalTransform(32)(read(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "centre"}, "crop: expected one of random_resized, resize, got 'centre'"),
        ({"interpolation": "lanczos"}, "interpolation: expected one of random"),
        ({"native": "yes"}, "native: expected one of auto"),
        ({"scale": (0.5, 0.1)}, r"scale: expected 0 < low <= high, got \(0.5, 0.1\)"),
        ({"image_size": 0}, "image_size: expected positive numbers"),
        ({"rand_augment": "m9"}, "rand_augment: only 'rand'"),
    ],
)
def test_wrong_options_are_errors_that_name_them(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainTransform(**options)  # type: ignore[arg-type]


def test_description_names_every_step() -> None:
    text = repr(TrainTransform(64, rand_augment="rand-m9-inc1", jitter=AffineJitter(degrees=7), native="off"))
    for part in ("random_resized", "(64, 64)", "scale=(0.08, 1.0)", "RandAugment(", "AffineJitter(degrees=7", "full"):
        assert part in text


def test_jitter_without_movement_changes_nothing() -> None:
    pixels = decode_rgb(read("rocket_17x13_tiny"))
    still = AffineJitter(degrees=0, translate=0, scale=(1, 1))
    np.testing.assert_array_equal(still(pixels, np.random.default_rng(0)), pixels)


def test_jitter_moves_within_its_bounds() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[28:36, 28:36] = 255
    jitter, centers = AffineJitter(degrees=0, translate=0.1, scale=(1, 1)), []
    for seed in range(200):
        moved = jitter(pixels, np.random.default_rng(seed))[..., 0].astype(float)
        rows, columns = np.indices(moved.shape)
        centers.append([(moved * rows).sum() / moved.sum(), (moved * columns).sum() / moved.sum()])
    offsets = np.array(centers) - 31.5
    assert np.abs(offsets).max() <= 6.5 and np.abs(offsets).max() > 5.5
    assert np.abs(offsets.mean(0)).max() < 1


def test_rotation_turns_counter_clockwise_and_scale_magnifies() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[30:34, 44:52] = 255  # to the right of the centre
    turned = warp(pixels, rotate_scale(90, 1, (0, 0), 64, 64), (0, 0, 0))
    assert turned[12:20, 30:34].mean() > 250  # above it
    grown = warp(pixels, rotate_scale(0, 1.5, (0, 0), 64, 64), (0, 0, 0))
    assert grown[..., 0].sum() == pytest.approx(1.5**2 * pixels[..., 0].sum(), rel=0.05)


def test_stacked_images_are_channels_last_and_equal() -> None:
    images = [to_tensor(np.random.default_rng(i).integers(0, 256, (5, 7, 3), dtype=np.uint8)) for i in range(4)]
    batch = stack_images(images)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, torch.stack(images))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("size", "crop_pct"), [(64, 0.875), (64, 1.0), (65, 0.93), ((48, 80), 0.9), (64, 1.2)])
def test_evaluation_pixels_equal_timms(
    size: int | tuple[int, int], crop_pct: float, mode: str, interpolation: str
) -> None:
    ours = EvalTransform(size, crop_pct=crop_pct, crop_mode=mode, interpolation=interpolation)  # type: ignore[arg-type]
    theirs = transforms_imagenet_eval(
        size, crop_pct=crop_pct, crop_mode=mode, interpolation=interpolation, use_prefetcher=True
    )
    for name in ("coffee_500x333_q90_420", "astronaut_375x500_q90_444", "chelsea_225x150_gray", "rocket_17x13_tiny"):
        image = Image.open(io.BytesIO(read(name))).convert("RGB")
        assert torch.equal(ours(read(name)), theirs(image)), name


def test_evaluation_refuses_a_picture_that_would_explode() -> None:
    sliver = png(np.zeros((1, 4000, 3), np.uint8))
    with pytest.raises(DecodeError, match="1 x 4000 pixels: too narrow"):
        EvalTransform(224, max_pixels=10_000_000)(sliver)


def test_evaluation_options_are_checked() -> None:
    with pytest.raises(ValueError, match="crop_mode: expected one of center, squash, border, got 'centre'"):
        EvalTransform(crop_mode="centre")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="crop_pct"):
        EvalTransform(crop_pct=0)
