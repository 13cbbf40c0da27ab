from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multiview_cases import random_scene
from restrike import geometry as g

seeds = st.integers(0, 10**6)


@given(seeds)
def test_inverse_composed_with_the_camera_is_the_identity(seed: int) -> None:
    cameras = random_scene(seed).world_to_camera
    identity = torch.eye(4, dtype=torch.float64)[:3].expand_as(cameras)
    torch.testing.assert_close(g.compose_se3(cameras, g.invert_se3(cameras)), identity)
    torch.testing.assert_close(g.invert_se3(g.invert_se3(cameras)), cameras)


@given(seeds)
def test_composition_equals_one_transform_after_the_other_and_the_4x4_product(seed: int) -> None:
    scene = random_scene(seed)
    a, b = scene.world_to_camera.unbind(0)
    points = scene.points_world[0]
    both = g.compose_se3(a, b)
    want = g.transform_points(a, g.transform_points(b, points))
    torch.testing.assert_close(g.transform_points(both, points), want)
    torch.testing.assert_close(g.homogeneous(both), g.homogeneous(a) @ g.homogeneous(b))


@given(seeds)
def test_centres_are_where_the_camera_sees_its_origin(seed: int) -> None:
    cameras = random_scene(seed).world_to_camera
    centers = g.camera_centers(cameras)
    torch.testing.assert_close(g.transform_points(cameras, centers), torch.zeros_like(centers))
    torch.testing.assert_close(centers, g.invert_se3(cameras)[..., 3])


@given(seeds)
def test_first_camera_becomes_the_world_and_points_stay_where_the_cameras_see_them(seed: int) -> None:
    scene = random_scene(seed)
    moved = g.to_first_camera(scene.world_to_camera)
    torch.testing.assert_close(moved[:, 0], torch.eye(4, dtype=torch.float64)[:3].expand(2, 3, 4))
    in_first = g.transform_points(scene.world_to_camera[:, 0], scene.points_world)
    seen, want = g.transform_points(moved, in_first), g.transform_points(scene.world_to_camera, scene.points_world)
    torch.testing.assert_close(seen, want)


@given(st.floats(0.1, 2.5), st.floats(0.1, 2.5))
def test_fields_of_view_come_back(height_fov: float, width_fov: float) -> None:
    fov = torch.tensor([height_fov, width_fov], dtype=torch.float64)
    intrinsics = g.fov_to_intrinsics(fov, (336, 518))
    torch.testing.assert_close(g.intrinsics_to_fov(intrinsics, (336, 518)), fov)
    assert intrinsics[:2, 2].tolist() == [259, 168]


def test_a_right_angle_of_view_has_half_the_side_as_focal_length() -> None:
    intrinsics = g.fov_to_intrinsics(torch.tensor([torch.pi / 2, torch.pi / 2]), (100, 300))
    torch.testing.assert_close(g.split_intrinsics(intrinsics)[0], torch.tensor([150.0, 50]))


def test_intrinsics_come_apart_as_they_were_put_together() -> None:
    focal, center = torch.rand(2, 3, 2) + 1, torch.rand(2)
    intrinsics = g.make_intrinsics(focal, center)
    assert torch.equal(g.split_intrinsics(intrinsics)[0], focal)
    assert torch.equal(g.split_intrinsics(intrinsics)[1], center.expand(2, 3, 2))
    assert torch.equal(intrinsics[..., 2, :], torch.tensor([0.0, 0, 1]).expand(2, 3, 3))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda e, k: e.__setitem__((1, 2, 0, 3), torch.nan), "not finite"),
        (lambda e, k: e.__setitem__((1, 2, 0, slice(0, 3)), 1.0), "no rotation"),
        (lambda e, k: e.__setitem__((1, 2, slice(None), 0), -e[1, 2, :, 0]), "no rotation"),
        (lambda e, k: k.__setitem__((1, 2, 0, 0), torch.inf), "not finite"),
        (lambda e, k: k.__setitem__((1, 2, 1, 1), -5.0), "not positive"),
    ],
    ids=["nan", "sheared", "mirrored", "infinite-focal", "negative-focal"],
)
def test_impossible_cameras_are_refused_by_index_and_source(break_it, message: str) -> None:
    scene = random_scene(0)
    g.check_cameras(scene.world_to_camera, scene.intrinsics)
    break_it(scene.world_to_camera, scene.intrinsics)
    with pytest.raises(ValueError, match=rf"apple/seq7: camera \[1, 2\] has .*{message}"):
        g.check_cameras(scene.world_to_camera, scene.intrinsics, source="apple/seq7")


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"transform: expected shape \[..., 3, 4\], got \[2, 4, 4\]"):
        g.invert_se3(torch.eye(4).expand(2, 4, 4))


def test_gradients_of_cameras_equal_finite_differences() -> None:
    scene = random_scene(0, batch=1, views=2)
    cameras = scene.world_to_camera.requires_grad_()
    intrinsics = scene.intrinsics.requires_grad_()
    assert torch.autograd.gradcheck(g.invert_se3, cameras)
    assert torch.autograd.gradcheck(g.to_first_camera, cameras)
    assert torch.autograd.gradcheck(lambda k: g.intrinsics_to_fov(k, (4, 6)), intrinsics)
