from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multiview_cases import random_scene
from restrike import geometry as g

seeds = st.integers(0, 10**6)


@given(seeds, st.sampled_from([0.0, 0.5]))
def test_unprojected_pixels_project_onto_themselves(seed: int, pixel_center: float) -> None:
    scene = random_scene(seed)
    points = g.unproject_depth(
        scene.depth, scene.intrinsics, g.invert_se3(scene.world_to_camera), pixel_center=pixel_center
    )
    pixels, depth = g.project_points(points, scene.intrinsics, scene.world_to_camera)
    grid = g.pixel_grid(*scene.depth.shape[-2:], pixel_center=pixel_center, dtype=torch.float64)
    torch.testing.assert_close(pixels, grid.expand_as(pixels))
    torch.testing.assert_close(depth, scene.depth)


def test_the_first_pixel_is_at_the_corner_and_columns_run_first() -> None:
    grid = g.pixel_grid(2, 3)
    assert grid[0, 0].tolist() == [0.5, 0.5]
    assert grid[1, 2].tolist() == [2.5, 1.5]


def test_unknown_depth_becomes_the_camera_centre() -> None:
    scene = random_scene(0)
    points = g.unproject_depth(torch.zeros_like(scene.depth), scene.intrinsics, g.invert_se3(scene.world_to_camera))
    centers = g.camera_centers(scene.world_to_camera)[:, :, None, None]
    torch.testing.assert_close(points, centers.expand_as(points))


def test_intrinsics_per_view_are_matched_to_maps_from_the_left() -> None:
    scene = random_scene(0, views=3, batch=2)
    batched = g.unproject_depth(scene.depth, scene.intrinsics)
    for b in range(2):
        for v in range(3):
            one = g.unproject_depth(scene.depth[b, v], scene.intrinsics[b, v])
            torch.testing.assert_close(batched[b, v], one)


def test_points_behind_or_at_the_camera_stay_finite_with_their_gradients() -> None:
    points = torch.tensor([[1.0, 1, -2], [1, 1, 0], [0, 0, 1e-12]], requires_grad=True)
    pixels, depth = g.project_points(points, torch.eye(3))
    pixels.sum().backward()
    assert pixels.isfinite().all() and points.grad is not None and points.grad.isfinite().all()
    assert (depth[:2] <= 0).all()


def test_gradients_of_projection_equal_finite_differences() -> None:
    scene = random_scene(1, views=2, batch=1, size=(2, 3))
    points = scene.points_world.detach().requires_grad_()
    cameras, intrinsics = scene.world_to_camera.requires_grad_(), scene.intrinsics.requires_grad_()
    depth = scene.depth.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: g.project_points(*x), (points, intrinsics, cameras))
    assert torch.autograd.gradcheck(
        lambda d, k, e: g.unproject_depth(d, k, g.invert_se3(e)), (depth, intrinsics, cameras)
    )


@given(st.floats(20, 500), st.sampled_from(["weiszfeld", "median"]))
def test_focal_length_of_exact_points_comes_back(focal: float, method: str) -> None:
    size, center = (10, 14), torch.tensor([7.0, 5.0], dtype=torch.float64)
    depth = 2 + torch.rand(2, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    intrinsics = g.make_intrinsics(torch.full((2, 2), focal, dtype=torch.float64), center)
    points = g.unproject_depth(depth, intrinsics)
    got = g.focal_from_points(points, center, method)  # type: ignore[arg-type]
    torch.testing.assert_close(got, torch.full((2,), focal, dtype=torch.float64))


def test_unknown_focal_method_is_named() -> None:
    with pytest.raises(ValueError, match="'weiszfeld' or 'median', got 'mean'"):
        g.focal_from_points(torch.rand(2, 2, 3), torch.zeros(2), "mean")  # type: ignore[arg-type]
