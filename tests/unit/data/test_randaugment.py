"""RandAugment's operations against Pillow's and timm's own, and the distribution of what is drawn."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment as timm_ops

from restrike.data import affine, photometric, randaugment
from restrike.data.decode import decode_rgb
from restrike.data.randaugment import OPERATIONS, RandAugment, operation_argument

JPEGS = Path(__file__).parents[2] / "data" / "jpegs"
FILL = (124, 116, 104)
RECIPE = "rand-m9-mstd0.5-inc1"


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    photo = decode_rgb((JPEGS / "coffee_500x333_q90_420.jpg").read_bytes())[40:264, 90:314]
    noise = rng.integers(0, 256, (33, 47, 3), dtype=np.uint8)
    flat = np.full((16, 16, 3), (10, 200, 77), np.uint8)
    two_levels = np.where(rng.random((24, 24, 1)) < 0.3, 40, 180).astype(np.uint8).repeat(3, 2)
    dark = (photo // 4 + 20).astype(np.uint8)
    return [np.ascontiguousarray(p) for p in (photo, noise, flat, two_levels, dark)]


def compare_to_timm(name: str, pixels: np.ndarray, *argument: float) -> np.ndarray:
    """Differences between our operation and timm's on Pillow, in levels."""
    ours = getattr(photometric, name)(pixels, *argument)
    theirs = getattr(timm_ops, name)(Image.fromarray(pixels), *argument)
    assert ours.shape == pixels.shape and ours.dtype == np.uint8
    return ours.astype(int) - np.asarray(theirs)


@pytest.mark.parametrize("name", ["auto_contrast", "equalize", "invert"])
def test_operations_without_argument_are_bit_exact(name: str) -> None:
    for pixels in pictures():
        assert not compare_to_timm(name, pixels).any()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("posterize", (1, 2, 3, 4)),
        ("solarize", (0, 13, 26, 128, 255, 256)),
        ("solarize_add", (0, 55, 99, 110)),
        ("contrast", (0.1, 0.19, 0.63, 1.0, 1.37, 1.81, 1.9)),
        ("brightness", (0.1, 0.19, 0.63, 1.0, 1.37, 1.81, 1.9)),
    ],
)
def test_operations_by_table_are_bit_exact(name: str, arguments: tuple[float, ...]) -> None:
    for pixels in pictures():
        for argument in arguments:
            assert not compare_to_timm(name, pixels, argument).any(), argument


@pytest.mark.parametrize(("name", "levels"), [("color", 2), ("sharpness", 1)])
@pytest.mark.parametrize("factor", [0.1, 0.19, 0.63, 1.0, 1.37, 1.81, 1.9])
def test_color_and_sharpness_are_within_their_bounds(name: str, levels: int, factor: float) -> None:
    for pixels in pictures():
        assert np.abs(compare_to_timm(name, pixels, factor)).max() <= levels
    photo = compare_to_timm(name, pictures()[0], factor)
    assert abs(photo.mean()) < 0.1  # no bias from rounding where Pillow cuts off


def test_posterize_to_no_bits_is_black() -> None:
    assert not photometric.posterize(pictures()[0], 0).any()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    ("name", "argument"),
    [("rotate", 27.0), ("shear_x", 0.27), ("shear_y", 0.27), ("translate_x_rel", 0.405), ("translate_y_rel", 0.405)],
)
def test_warps_resemble_pillows(name: str, argument: float, sign: int, interpolation: str) -> None:
    pixels = pictures()[0]
    ours_name = {"rotate": "Rotate", "shear_x": "ShearX", "shear_y": "ShearY"}.get(name, "")
    ours_name = ours_name or {"translate_x_rel": "TranslateXRel", "translate_y_rel": "TranslateYRel"}[name]
    matrix = randaugment._matrix(ours_name, sign * argument, *pixels.shape[:2])
    ours = affine.warp(pixels, matrix, FILL, interpolation)  # type: ignore[arg-type]
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    warp = getattr(timm_ops, name)
    theirs = np.asarray(warp(Image.fromarray(pixels), sign * argument, resample=resample, fillcolor=FILL))
    assert psnr(ours, theirs) > 36
    # Away from the fill's border only rounding and the cubic's shape differ.
    inside = (np.abs(theirs.astype(int) - FILL).max(2) > 0)[8:-8, 8:-8]
    assert np.median(np.abs(ours.astype(int) - theirs)[8:-8, 8:-8][inside]) <= 1


@pytest.mark.parametrize("magnitude", [0.0, 2.4, 5.0, 8.6, 9.0, 10.0])
@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in ("AutoContrast", "Equalize", "Invert")])
def test_arguments_are_those_of_timm(
    name: str, increasing: bool, magnitude: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs_name = name
    if increasing and name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"):
        theirs_name += "Increasing"
    for negate in (False, True):
        monkeypatch.setattr(timm_ops.random, "random", lambda negate=negate: 0.9 if negate else 0.1)
        (theirs,) = timm_ops.LEVEL_TO_ARG[theirs_name](magnitude, {"translate_pct": 0.45})
        ours = operation_argument(name, magnitude, increasing, negate)
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_recipe_is_read_as_timm_reads_it() -> None:
    theirs = timm_ops.rand_augment_transform(RECIPE, {"img_mean": FILL})
    ours = RandAugment.parse(RECIPE)
    operation = theirs.ops[0]
    assert (ours.num_ops, ours.magnitude, ours.probability) == (theirs.num_layers, operation.magnitude, operation.prob)
    assert (ours.magnitude_std, ours.magnitude_max) == (operation.magnitude_std, 10)
    assert [op.name.removesuffix("Increasing") for op in theirs.ops] == list(OPERATIONS)
    assert ours.increasing and any(op.name.endswith("Increasing") for op in theirs.ops)
    assert ours.fill == operation.kwargs["fillcolor"]


def test_every_section_of_the_notation_is_read() -> None:
    policy = RandAugment.parse("rand-m7-n3-p0.3-mstd101-mmax12-inc0", interpolation="bilinear")
    assert policy == RandAugment(7, 3, 0.3, math.inf, 12, False, FILL, "bilinear")


@pytest.mark.parametrize("spec", ["augmix-m3", "rand-m9-w0", "rand-tweights", "rand-m", "original", "rand-m9-x1", ""])
def test_what_cannot_be_read_is_an_error_that_shows_the_notation(spec: str) -> None:
    with pytest.raises(ValueError, match=r"rand_augment: .*expected rand\["):
        RandAugment.parse(spec)


def test_operations_are_drawn_as_the_policy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Counter[str] = Counter()
    monkeypatch.setattr(
        RandAugment, "_apply", lambda self, name, pixels, magnitude, rng: drawn.update([name]) or pixels
    )
    policy, rng, images = RandAugment.parse(RECIPE), np.random.default_rng(0), 6000
    for _ in range(images):
        policy(np.zeros((2, 2, 3), np.uint8), rng)
    assert set(drawn) == set(OPERATIONS)
    assert drawn.total() == pytest.approx(images, rel=0.05)  # two draws, each applied with probability one half
    for count in drawn.values():
        assert count == pytest.approx(images / 15, rel=0.2)  # four standard deviations


def test_magnitudes_are_normal_and_clipped() -> None:
    rng = np.random.default_rng(0)
    policy = RandAugment.parse(RECIPE)
    magnitudes = np.array([policy.draw_magnitude(rng) for _ in range(20_000)])
    assert magnitudes.max() == 10
    assert np.mean(magnitudes == 10) == pytest.approx(0.0228, abs=0.005)  # beyond two standard deviations
    assert np.median(magnitudes) == pytest.approx(9, abs=0.02)
    assert magnitudes[magnitudes < 10].std() == pytest.approx(0.47, abs=0.02)
    uniform = RandAugment(magnitude=8, magnitude_std=math.inf)
    assert np.mean([uniform.draw_magnitude(rng) for _ in range(4000)]) == pytest.approx(4, abs=0.2)


def test_the_input_is_never_written_to() -> None:
    pixels = pictures()[1]
    before = pixels.copy()
    policy = RandAugment(num_ops=4, probability=1, magnitude_std=2)
    for seed in range(60):
        policy(pixels, np.random.default_rng(seed))
    np.testing.assert_array_equal(pixels, before)


def test_equal_generators_give_equal_pictures() -> None:
    policy, pixels = RandAugment.parse(RECIPE), pictures()[0]
    for seed in range(20):
        first, second = (policy(pixels, np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(first, second)


def test_every_operation_changes_a_photo() -> None:
    pixels, rng = pictures()[4], np.random.default_rng(0)
    policy = RandAugment.parse(RECIPE)
    for name in OPERATIONS:
        assert not np.array_equal(policy._apply(name, pixels, 9.0, rng), pixels), name
