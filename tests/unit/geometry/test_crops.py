from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multiview_cases import random_scene
from restrike import geometry as g

sizes = st.integers(20, 400)
centers = st.sampled_from([g.PIXEL_CENTER, g.OPENCV_PIXEL_CENTER])


def project(intrinsics: Tensor) -> Tensor:
    scene = random_scene(3)
    points = g.transform_points(scene.world_to_camera, scene.points_world)
    return g.project_points(points, intrinsics)[0]


@given(st.integers(-50, 50), st.integers(-50, 50))
def test_a_crop_moves_every_projection_by_its_corner(left: int, top: int) -> None:
    intrinsics = random_scene(3).intrinsics
    moved = project(g.crop_intrinsics(intrinsics, left, top))
    torch.testing.assert_close(moved, project(intrinsics) - torch.tensor([left, top]))


@given(st.floats(0.1, 4), st.floats(0.1, 4), centers)
def test_a_resize_scales_projections_about_the_corner(sx: float, sy: float, pixel_center: float) -> None:
    intrinsics = random_scene(3).intrinsics
    to_corner = 0.5 - pixel_center
    moved = project(g.resize_intrinsics(intrinsics, sx, sy, pixel_center))
    want = (project(intrinsics) + to_corner) * torch.tensor([sx, sy], dtype=torch.float64) - to_corner
    torch.testing.assert_close(moved, want)


def test_crops_and_resizes_take_one_value_per_camera() -> None:
    intrinsics = random_scene(3).intrinsics  # [2, 3, 3, 3]
    left = torch.arange(6.0).view(2, 3)
    assert torch.equal(g.crop_intrinsics(intrinsics, left, 0.0)[..., 0, 2], intrinsics[..., 0, 2] - left)
    scaled = g.resize_intrinsics(intrinsics, left + 1, 1.0)
    torch.testing.assert_close(scaled[..., 0, 0], intrinsics[..., 0, 0] * (left + 1))


@pytest.mark.parametrize("clockwise", [True, False])
@pytest.mark.parametrize("pixel_center", [0.0, 0.5])
def test_after_a_quarter_turn_the_camera_sees_what_the_turned_image_shows(clockwise: bool, pixel_center: float) -> None:
    scene = random_scene(3, size=(4, 6))
    to_world = g.invert_se3(scene.world_to_camera)
    points = g.unproject_depth(scene.depth, scene.intrinsics, to_world, pixel_center)
    cameras, intrinsics = g.rotate_camera_90(
        scene.world_to_camera, scene.intrinsics, (4, 6), clockwise, pixel_center=pixel_center
    )
    turns = -1 if clockwise else 1
    depth = scene.depth.rot90(turns, (2, 3))
    got = g.unproject_depth(depth, intrinsics, g.invert_se3(cameras), pixel_center)
    torch.testing.assert_close(got, points.rot90(turns, (2, 3)))


@given(sizes, sizes, sizes, sizes, st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.booleans())
def test_crops_about_the_principal_point_keep_their_promise(
    h: int, w: int, target_h: int, target_w: int, fx: float, fy: float, strict: bool
) -> None:
    center = (fx * w, fy * h)
    box = g.principal_point_crop((h, w), center, (target_h, target_w), strict)
    assert box.left >= 0 and box.top >= 0
    if strict:
        assert (box.height, box.width) == (target_h, target_w)
    else:
        assert box.left + box.width <= w and box.top + box.height <= h
        assert box.width <= target_w and box.height <= target_h
        assert abs(center[0] - box.left - box.width / 2) <= 1 and abs(center[1] - box.top - box.height / 2) <= 1


def test_a_principal_point_outside_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"principal point \(200, 5\) lies outside .* \(10, 100\)"):
        g.principal_point_crop((10, 100), (200, 5), (8, 8), strict=False)
    with pytest.raises(ValueError, match="nearer than 1/5"):
        g.symmetric_crop((100, 100), (15, 50))


@given(sizes, sizes, st.sampled_from([(224, 224), (168, 518), (384, 512)]), st.integers(0, 15))
def test_covering_sizes_cover(h: int, w: int, target: tuple[int, int], extra: int) -> None:
    (new_h, new_w), scale = g.covering_size((h, w), target, margin=4)
    assert new_h >= target[0] and new_w >= target[1]
    assert scale == max(new_h / h, new_w / w)
    intrinsics = g.make_intrinsics(torch.tensor([h * 1.0, h]), torch.tensor([w / 2, h / 2]))
    plan = g.covering_crop((h, w), intrinsics, target, extra)
    assert plan.resized[0] >= target[0] + extra and plan.resized[1] >= target[1] + extra
    assert plan.box.left + plan.box.width <= plan.resized[1] and plan.box.top + plan.box.height <= plan.resized[0]
    # A central principal point stays central, up to the rounding of the box.
    assert abs(float(plan.intrinsics[0, 2]) - target[1] / 2) <= 0.51


@given(st.integers(0, 10**6), st.sampled_from([(480, 640), (640, 480)]))
def test_patch_centres_are_ndc_of_the_pixels_under_them(seed: int, size: tuple[int, int]) -> None:
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    corner = 100 * torch.rand(3, 2, generator=generator, dtype=torch.float64)
    side = 50 + 300 * torch.rand(3, 1, generator=generator, dtype=torch.float64)
    parameters = g.crop_parameters(torch.cat([corner, corner + side], dim=-1), torch.tensor(size))
    patches = 4
    ndc = g.patch_centers(parameters, patches)
    share = g.pixel_grid(patches, patches, dtype=torch.float64) / patches
    pixels = corner[:, None, None] + share * side[:, None, None]
    half = min(size) / 2
    want = torch.stack([(width / 2 - pixels[..., 0]) / half, (height / 2 - pixels[..., 1]) / half], dim=-1)
    torch.testing.assert_close(ndc, want)
