"""Parts of a resize equal the parts of the whole; faster percentiles and hole filling equal the plain ones."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from restrike.data.multiview_pixels import (
    cut,
    drop_farthest,
    fill_holes,
    resize_nearest,
    resize_picture,
    sample_nearest,
)
from restrike.geometry import CropBox

SIDE = st.integers(8, 90)


def box_in(size: tuple[int, int], random: np.random.Generator, beyond: int = 0) -> CropBox:
    """A random box of a picture of (H, W), up to `beyond` pixels over its right and lower edge."""
    top, left = (int(random.integers(0, side - 1)) for side in size)
    height, width = (int(random.integers(1, side - b + beyond + 1)) for side, b in zip(size, (top, left), strict=True))
    return CropBox(left, top, width, height)


@settings(max_examples=60, deadline=None)
@given(SIDE, SIDE, SIDE, SIDE, st.integers(0, 999))
def test_a_part_of_a_resized_picture_equals_that_of_the_whole(
    h: int, w: int, new_h: int, new_w: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (h, w, 3), dtype=np.uint8)
    kind = Image.Resampling.LANCZOS if new_h < h or new_w < w else Image.Resampling.BICUBIC
    whole = np.array(Image.fromarray(image).resize((new_w, h), kind).resize((new_w, new_h), kind))
    box = box_in((new_h, new_w), random, beyond=5)
    part = resize_picture(image, (new_h, new_w), box).astype(int)
    wanted = cut(whole, box).astype(int)
    assert part.shape == wanted.shape and np.abs(part - wanted).max() <= 1
    assert (part != wanted).sum() <= 1 + 0.01 * part.size, "noise, enlarged, has many ties"
    np.testing.assert_array_equal(resize_picture(image, (new_h, new_w)), whole)


def test_a_part_of_a_resized_photograph_is_the_same_to_the_last_bit_almost_everywhere() -> None:
    from restrike.data.decode import decode_rgb
    from shard_tools import JPEGS

    image = decode_rgb((JPEGS / "hubble_1000x872_q75.jpg").read_bytes())
    differing = total = 0
    for size, box in (((611, 533), CropBox(7, 101, 518, 350)), ((455, 397), CropBox(13, 40, 300, 222))):
        whole = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))
        differing += int((resize_picture(image, size, box) != cut(whole, box)).sum())
        total += 3 * box.width * box.height
    assert differing / total < 1e-4


@settings(max_examples=60, deadline=None)
@given(SIDE, SIDE, SIDE, SIDE, st.integers(0, 999))
def test_nearest_parts_equal_opencvs(h: int, w: int, new_h: int, new_w: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    depth = random.random((h, w)).astype(np.float32)
    whole = cv2.resize(depth, (new_w, new_h), interpolation=cv2.INTER_NEAREST)
    box = box_in((new_h, new_w), random, beyond=5)
    np.testing.assert_array_equal(resize_nearest(depth, (new_h, new_w), box), cut(whole, box))
    np.testing.assert_array_equal(resize_nearest(depth, (new_h, new_w)), whole)


@settings(max_examples=40, deadline=None)
@given(SIDE, SIDE, st.integers(1, 40), st.integers(0, 999))
def test_sampled_boxes_equal_a_crop_then_nearest_exact(h: int, w: int, side: int, seed: int) -> None:
    import torch

    random = np.random.default_rng(seed)
    depth = random.random((h, w)).astype(np.float32) + 1
    left, top, width = (int(x) for x in random.integers((-9, -9, 5), (9, 9, 60)))
    box = CropBox(left, top, width, width)
    crop = torch.from_numpy(cut(depth, box).copy())[None, None]
    wanted = torch.nn.functional.interpolate(crop, (side, side), mode="nearest-exact")[0, 0]
    np.testing.assert_array_equal(sample_nearest(depth, side, box), wanted.numpy())


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([90.0, 98.0, 99.5]), st.sampled_from([0.0, 0.5, 0.97, 1.0]), st.booleans())
def test_far_depth_is_dropped_as_by_numpys_percentile(seed: int, percentile: float, empty: float, few: bool) -> None:
    random = np.random.default_rng(seed)
    depth = (random.random((random.integers(2, 60), random.integers(2, 60))) * 9).astype(np.float16).astype(np.float32)
    depth[random.random(depth.shape) < empty] = 0
    if few:
        depth = np.round(depth)  # many equal values at the bound
    wanted = np.where(depth > np.percentile(depth, percentile), 0, depth)
    np.testing.assert_array_equal(drop_farthest(depth, percentile), wanted)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(40, 33), (7, 90), (90, 7)])
def test_every_hole_takes_a_nearest_valid_pixel(share: float, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    depth = random.random(shape).astype(np.float32) + 1
    valid = random.random(shape) > share
    valid[3, 4] = True
    valid[:, 6] = False  # a column without any
    filled = fill_holes(depth, valid)
    places = np.argwhere(valid)
    for y, x in np.argwhere(~valid):
        squared = ((places - [y, x]) ** 2).sum(1)
        assert float(filled[y, x]) in {float(depth[tuple(place)]) for place in places[squared == squared.min()]}
    np.testing.assert_array_equal(filled[valid], depth[valid])
