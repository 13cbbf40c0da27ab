from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multiview_cases import random_scene
from restrike import geometry as g

seeds = st.integers(0, 10**6)
formats = st.sampled_from(["ndc_isotropic", "ndc_norm_image_bounds"])


@given(seeds, formats)
def test_pytorch3d_cameras_come_back(seed: int, intrinsics_format: str) -> None:
    scene = random_scene(seed)
    size = torch.tensor([[480, 640], [700, 300]])[:, None]
    there = g.to_pytorch3d(scene.world_to_camera, scene.intrinsics, size, intrinsics_format)
    cameras, intrinsics = g.from_pytorch3d(there, size, intrinsics_format)
    torch.testing.assert_close(cameras, scene.world_to_camera)
    torch.testing.assert_close(intrinsics, scene.intrinsics)


@given(seeds, st.sampled_from([(480, 640), (640, 480)]))
def test_a_point_lands_on_the_same_pixel_by_pytorch3ds_own_formula(seed: int, size: tuple[int, int]) -> None:
    scene, (height, width) = random_scene(seed), size
    p3d = g.to_pytorch3d(scene.world_to_camera, scene.intrinsics, torch.tensor(size))
    points = scene.points_world[:, 0, 0]  # [B, W, 3]
    view = points[:, None] @ p3d.R + p3d.T[..., None, :]  # X R + T: x left, y up
    ndc = p3d.focal_length[..., None, :] * view[..., :2] / view[..., 2:] + p3d.principal_point[..., None, :]
    half = min(size) / 2
    pixels = torch.stack([width / 2 - half * ndc[..., 0], height / 2 - half * ndc[..., 1]], dim=-1)
    want, depth = g.project_points(points[:, None].expand_as(view), scene.intrinsics, scene.world_to_camera)
    torch.testing.assert_close(view[..., 2], depth)
    torch.testing.assert_close(pixels, want)


def test_the_two_ndc_formats_differ_as_the_sides_do() -> None:
    scene, size = random_scene(0), torch.tensor([300, 600])
    isotropic, by_bounds = (
        g.to_pytorch3d(scene.world_to_camera, scene.intrinsics, size, f)  # type: ignore[arg-type]
        for f in ("ndc_isotropic", "ndc_norm_image_bounds")
    )
    ratio = isotropic.focal_length / by_bounds.focal_length
    torch.testing.assert_close(ratio, torch.tensor([2.0, 1.0], dtype=torch.float64).expand_as(ratio))
    with pytest.raises(ValueError, match="ndc_isotropic, ndc_norm_image_bounds"):
        g.to_pytorch3d(scene.world_to_camera, scene.intrinsics, size, "ndc")  # type: ignore[arg-type]


@given(seeds)
def test_opengl_cameras_come_back_and_look_along_minus_z(seed: int) -> None:
    cameras = random_scene(seed).world_to_camera
    opengl = g.to_opengl(cameras)
    torch.testing.assert_close(g.from_opengl(opengl), cameras)
    ahead = opengl[..., 3] - opengl[..., 2]  # one unit along OpenGL's -z
    above = opengl[..., 3] + opengl[..., 1]
    e = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(g.transform_points(cameras, ahead), e[2].expand_as(ahead))
    torch.testing.assert_close(g.transform_points(cameras, above), -e[1].expand_as(above))


@given(seeds)
def test_colmap_cameras_come_back(seed: int) -> None:
    scene = random_scene(seed)
    qvec, tvec, params = g.to_colmap(scene.world_to_camera, scene.intrinsics)
    cameras, intrinsics = g.from_colmap(qvec, tvec, "PINHOLE", params)
    torch.testing.assert_close(cameras, scene.world_to_camera)
    torch.testing.assert_close(intrinsics, scene.intrinsics)


def test_colmap_models_are_read_by_their_parameter_names() -> None:
    pose = torch.tensor([1.0, 0, 0, 0]), torch.zeros(3)
    _, simple = g.from_colmap(*pose, "SIMPLE_PINHOLE", torch.tensor([5.0, 2, 3]))
    _, radial = g.from_colmap(*pose, "SIMPLE_RADIAL", torch.tensor([5.0, 2, 3, 1e-5]))
    want = torch.tensor([[5.0, 0, 2], [0, 5, 3], [0, 0, 1]])
    assert torch.equal(simple, want)
    assert torch.equal(radial, want)
    with pytest.raises(ValueError, match=r"distortion above 0\.001: run `colmap image_undistorter`"):
        g.from_colmap(*pose, "OPENCV", torch.tensor([5.0, 5, 2, 3, 0, 0.1, 0, 0]))
    with pytest.raises(ValueError, match="'FISHEYE': expected one of SIMPLE_PINHOLE"):
        g.from_colmap(*pose, "FISHEYE", torch.zeros(4))
    with pytest.raises(ValueError, match=r"parameters of COLMAP's PINHOLE: expected shape \[..., 4\]"):
        g.from_colmap(*pose, "PINHOLE", torch.zeros(3))


def test_moving_the_pixel_centre_keeps_rays_through_the_same_pixels() -> None:
    scene = random_scene(0)
    opencv = g.shift_pixel_center(scene.intrinsics, g.PIXEL_CENTER, g.OPENCV_PIXEL_CENTER)
    want = g.unproject_depth(scene.depth, scene.intrinsics)
    got = g.unproject_depth(scene.depth, opencv, pixel_center=g.OPENCV_PIXEL_CENTER)
    torch.testing.assert_close(got, want)
