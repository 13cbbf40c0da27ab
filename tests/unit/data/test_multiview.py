"""Packed scenes: reads, filters, the three families' transforms, and bad input."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from multiview_sets import copy_set, toy_set  # noqa: F401
from restrike import geometry as g
from restrike.data.cache import ShardCache
from restrike.data.color_jitter import ColorJitter
from restrike.data.decode import DecodeError
from restrike.data.depth_png import decode_depth, decode_mask, decode_mask_pair, encode_depth, encode_mask_pair
from restrike.data.multiview_filter import SEEN, UNSEEN, SceneFilter
from restrike.data.multiview_index import build_scene_index
from restrike.data.multiview_pixels import cut, fill_holes
from restrike.data.multiview_plan import FixedShape
from restrike.data.multiview_source import SceneSource, open_scenes
from restrike.data.multiview_transforms import CUT3RViews, DiffusionSfMViews, VGGTViews
from restrike.data.samples import MultiViewSample
from restrike.data.source import BadSampleError

ALL = SceneFilter(min_quality=None)


def opened(data: Path, filter: SceneFilter = ALL) -> SceneSource:
    return open_scenes(str(data), ShardCache(data), filter)


def disagreement(sample: MultiViewSample) -> float:
    """Median relative difference of view 0's depth, seen from view 1, to view 1's own."""
    scale = sample.depth.shape[-1] / sample.images.shape[-1]
    intrinsics = g.resize_intrinsics(sample.intrinsics, scale, scale).double()
    depth, cameras = sample.depth.double(), sample.world_to_camera.double()
    world = g.unproject_depth(depth[0], intrinsics[0], g.invert_se3(cameras[0]))[sample.valid_depth[0]]
    pixels, z = g.project_points(world, intrinsics[1], cameras[1])
    pixels = pixels.floor().long()
    inside = (pixels >= 0).all(-1) & (pixels < torch.tensor([depth.shape[2], depth.shape[1]])).all(-1)
    x, y = pixels[inside].unbind(-1)
    seen = sample.valid_depth[1][y, x]
    return float(((z[inside] - depth[1][y, x]).abs() / depth[1][y, x])[seen].median())


def test_depth_survives_the_half_float_png_and_unknown_becomes_zero() -> None:
    depth = np.array([[0.5, 0, 3.25], [np.inf, np.nan, 1024]], dtype=np.float32)
    np.testing.assert_array_equal(decode_depth(encode_depth(depth)), [[0.5, 0, 3.25], [0, 0, 1024]])
    assert decode_depth(encode_depth(depth), scale_adjustment=2.0)[0, 0] == 1


def test_both_masks_survive_one_png() -> None:
    foreground = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    mask = foreground % 40 == 0
    back = decode_mask_pair(encode_mask_pair(foreground, mask))
    np.testing.assert_array_equal(back[0], foreground)
    np.testing.assert_array_equal(back[1], mask)


@pytest.mark.parametrize("keep", [0, 8, 40, -6])
def test_truncated_depth_is_refused_and_not_read_as_black(keep: int) -> None:
    data = encode_depth(np.ones((20, 20)))
    with pytest.raises(DecodeError, match="PNG"):
        decode_depth(data[:keep])
    with pytest.raises(DecodeError, match="8-bit"):
        decode_mask(data)


def test_stored_views_equal_the_tree_and_only_drawn_frames_are_read(toy_set: Path) -> None:  # noqa: F811
    source = opened(toy_set)
    assert len(source) == 16 and source.key(0) == "apple/110_10000_20000"
    views = source.read(3, np.array([5, 2]))
    assert [view.number for view in views] == [5, 2]
    assert views[0].image.shape[:2] == views[0].depth.shape == views[0].foreground.shape
    assert (views[0].depth[views[0].depth_mask] > 0).all() and views[0].foreground.max() == 255


def test_index_can_be_built_again_from_the_shard_alone(toy_set: Path) -> None:  # noqa: F811
    tar = sorted(toy_set.glob("*.tar"))[0]
    assert build_scene_index(tar).to_bytes() == tar.with_suffix(".idx").read_bytes()


@pytest.mark.parametrize(
    ("filter", "scenes"),
    [
        (SceneFilter(min_quality=None), 16),
        (SceneFilter(categories=("seen",), min_quality=None), 12),
        (SceneFilter(categories=("unseen",), min_quality=None), 4),
        (SceneFilter(categories=("cup", "unseen"), min_quality=None), 8),
        (SceneFilter(subsets=("fewview_dev/train",), min_quality=None), 12),
        (SceneFilter(subsets=("fewview_dev/test",), min_quality=None), 4),
        (SceneFilter(subsets=("fewview_dev/train", "fewview_dev/test"), min_quality=None), 16),
        (SceneFilter(max_per_category=2, min_quality=None), 8),
        (SceneFilter(exclude=("110_10000_20000",), min_quality=None), 15),
        (SceneFilter(min_frames=9, min_quality=None), 0),
        (SceneFilter(min_quality=99.0), 0),
        (SceneFilter(max_translation=1e-3, min_quality=None), 0),
    ],
)
def test_filters_choose_from_one_set(toy_set: Path, filter: SceneFilter, scenes: int) -> None:  # noqa: F811
    assert len(opened(toy_set, filter)) == scenes


def test_half_of_a_sequence_can_be_a_subset(toy_set: Path) -> None:  # noqa: F811
    source = opened(toy_set, SceneFilter(subsets=("manyview_dev_0/test",), min_quality=None))
    assert len(source) == 4 and [len(rows) for rows in source.rows] == [4] * 4
    assert source.numbers[source.rows[0]].tolist() == [1, 3, 5, 7]


def test_low_quality_is_left_out_of_the_tiny_tree_set(tmp_path: Path) -> None:
    from multiview_sets import TINY_TREE
    from restrike.data_prep.co3d import SceneOptions, prepare_co3d

    prepare_co3d(TINY_TREE, tmp_path, SceneOptions())
    assert len(opened(tmp_path)) == 4
    assert len(opened(tmp_path, SceneFilter(min_quality=0.5))) == 3


def test_splits_have_41_and_10_categories() -> None:
    assert len(SEEN) == 41 and len(UNSEEN) == 10 and not set(SEEN) & set(UNSEEN)


@pytest.mark.parametrize("filter", [SceneFilter(subsets=("fewview/train",)), SceneFilter(categories=("dog",))])
def test_misspelt_filter_is_an_error_that_lists_what_there_is(toy_set: Path, filter: SceneFilter) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="fewview_dev/test|apple"):
        opened(toy_set, filter)


@pytest.mark.parametrize(
    ("transform", "size"),
    [
        (VGGTViews(is_training=False, exact_pixels=True, depth_percentile=100), (56, 56)),
        (VGGTViews(exact_pixels=True, depth_percentile=100), (42, 56)),
        (VGGTViews(exact_pixels=True, depth_percentile=100, max_extra=0), (42, 56)),
        (CUT3RViews(is_training=False, exact_pixels=True), (48, 64)),
        (CUT3RViews(exact_pixels=True, background_prob=0), (64, 48)),
        (DiffusionSfMViews(is_training=False, depth_size=56), (56, 56)),
        (DiffusionSfMViews(depth_size=56), (56, 56)),
    ],
)
def test_every_familys_views_agree_in_three_dimensions(toy_set: Path, transform, size) -> None:  # noqa: F811, ANN001
    source = opened(toy_set)
    found = []
    for scene in range(0, 16, 3):
        sample = transform(source.read(scene, np.array([2, 3])), size, np.zeros(2), np.random.default_rng(scene))
        assert sample.images.shape == (2, 3, *size)
        found.append(disagreement(sample))
    # On pictures of 64 pixels one pixel is about 1 % of the depth.
    assert np.median(found) < 0.015 and max(found) < 0.03, found


def test_the_released_half_pixel_shifts_the_camera_and_nothing_else(toy_set: Path) -> None:  # noqa: F811
    views = opened(toy_set).read(0, np.array([0]))
    released, exact = (
        CUT3RViews(is_training=False, exact_pixels=e)(views, (48, 64), np.zeros(1), None) for e in (False, True)
    )
    assert torch.equal(released.depth, exact.depth) or released.depth.shape == exact.depth.shape
    shift = (released.intrinsics - exact.intrinsics)[0, :2, 2]
    assert 0.1 < float(shift.abs().max()) < 1.5


def test_background_masking_drops_depth_and_keeps_the_picture(toy_set: Path) -> None:  # noqa: F811
    views = opened(toy_set).read(0, np.array([0]))
    size = (48, 64)
    plain = CUT3RViews(background_prob=0, aug_crop=1)(views, size, np.zeros(1), np.random.default_rng(0))
    masked = CUT3RViews(background_prob=1, aug_crop=1)(views, size, np.zeros(1), np.random.default_rng(0))
    assert torch.equal(plain.images, masked.images)
    assert 0 < int(masked.valid_depth.sum()) < int(plain.valid_depth.sum())
    assert not bool((masked.valid_depth & ~masked.foreground & (masked.foreground.float() == 0)).all())


def test_principal_point_at_the_edge_is_a_bad_frame(toy_set: Path) -> None:  # noqa: F811
    view = opened(toy_set).read(0, np.array([0]))[0]
    intrinsics = view.intrinsics.copy()
    intrinsics[0, 2] = 1.0
    with pytest.raises(BadSampleError, match="frame 0: principal point"):
        CUT3RViews()([view._replace(intrinsics=intrinsics)], (48, 64), np.zeros(1), np.random.default_rng(0))


def test_holes_take_the_value_of_the_nearest_valid_pixel() -> None:
    random = np.random.default_rng(0)
    depth = random.random((9, 7)).astype(np.float32) + 1
    valid = random.random((9, 7)) > 0.7
    filled = fill_holes(depth, valid)
    places = np.argwhere(valid)
    for y, x in np.argwhere(~valid):
        squared = ((places - [y, x]) ** 2).sum(1)
        nearest = {float(depth[tuple(place)]) for place in places[squared == squared.min()]}
        assert float(filled[y, x]) in nearest
    np.testing.assert_array_equal(filled[valid], depth[valid])
    assert (fill_holes(depth, np.zeros_like(valid)) == -1).all()


def test_a_crop_beyond_the_image_is_padded_with_zeros() -> None:
    pixels = np.arange(6).reshape(2, 3) + 1
    np.testing.assert_array_equal(cut(pixels, g.CropBox(-1, -1, 5, 3)), [[0] * 5, [0, 1, 2, 3, 0], [0, 4, 5, 6, 0]])
    assert cut(pixels, g.CropBox(5, 5, 2, 2)).sum() == 0


def test_color_jitter_is_one_draw_for_a_scene_or_one_a_view() -> None:
    images = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    jitter = ColorJitter(gray_prob=0.2, blur_prob=0.5)
    same = jitter(images, True, torch.Generator().manual_seed(1))
    own = jitter(images, False, torch.Generator().manual_seed(1))
    assert torch.allclose(same[0], same[2], atol=1e-6) and not torch.allclose(own[0], own[2], atol=1e-3)
    assert 0 <= float(own.min()) and float(own.max()) <= 1
    assert torch.equal(ColorJitter(prob=0)(images, True, torch.Generator()), images)


# Bad input


def test_missing_and_truncated_shards_are_named_before_anything_is_read(toy_set: Path, tmp_path: Path) -> None:  # noqa: F811
    data = copy_set(toy_set, tmp_path)
    tar = sorted(data.glob("*.tar"))[1]
    tar.write_bytes(tar.read_bytes()[:-2048])
    with pytest.raises(ValueError, match=f"{tar.name} has .* bytes, its catalogue says .*; prepare or fetch"):
        opened(data)
    tar.unlink()
    with pytest.raises(ValueError, match=f"{tar.name} is missing"):
        opened(data)


def test_no_set_and_a_damaged_catalogue_say_what_to_run(toy_set: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="prepare toy"):
        opened(tmp_path)
    data = copy_set(toy_set, tmp_path)
    (data / "catalogue.json").write_text("{}")
    with pytest.raises(ValueError, match="prepare co3d"):
        opened(data)
    (data / "catalogue.json").write_text((toy_set / "catalogue.json").read_text().replace("co3d-apple", "../apple"))
    with pytest.raises(ValueError, match="refused"):
        opened(data)


def test_filters_are_part_of_the_fingerprint(toy_set: Path) -> None:  # noqa: F811
    other = replace(ALL, min_frames=2)
    assert opened(toy_set).fingerprint == opened(toy_set).fingerprint != opened(toy_set, other).fingerprint


def test_more_views_at_least_than_at_most_are_refused():
    with pytest.raises(ValueError, match="min_views is 4, expected 1 to 3"):
        FixedShape(3, (8, 8), 1, min_views=4)
