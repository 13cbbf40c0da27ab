from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from multiview_cases import Scene, move_world, random_scene, random_similarity
from restrike import geometry as g

seeds = st.integers(0, 10**6)


def scene_rays(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    grid = g.pixel_grid(*scene.depth.shape[-2:], dtype=torch.float64).expand(*scene.depth.shape, 2)
    return g.ray_origins_and_endpoints(grid, scene.depth, scene.intrinsics, scene.world_to_camera)


@given(seeds, st.floats(-5, 5).filter(lambda x: abs(x) > 0.1))
def test_encoded_rays_come_back_whatever_the_scale_of_the_map(seed: int, scale: float) -> None:
    origins, endpoints = scene_rays(random_scene(seed))
    encoded = g.encode_rays(origins, endpoints)
    assert encoded.shape[-3:] == (8, 4, 6)
    torch.testing.assert_close(encoded[..., :4, :, :].norm(dim=-3), torch.ones(2, 3, 4, 6, dtype=torch.float64))
    for got, want in zip(g.decode_rays(scale * encoded), (origins, endpoints), strict=True):
        # The published 1e-6 beside w is all that may be lost.
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-4)


@given(seeds)
def test_endpoints_are_the_surface_and_origins_the_centres(seed: int) -> None:
    scene = random_scene(seed)
    origins, endpoints = scene_rays(scene)
    torch.testing.assert_close(endpoints, scene.points_world)
    centers = g.camera_centers(scene.world_to_camera)[:, :, None, None]
    torch.testing.assert_close(origins, centers.expand_as(origins))


@given(seeds)
def test_points_lie_on_their_pixels_rays(seed: int) -> None:
    scene = random_scene(seed)
    to_world = g.invert_se3(scene.world_to_camera)
    origins, directions = g.pixel_rays(scene.intrinsics, to_world, (4, 6), unit=False)
    torch.testing.assert_close(origins + scene.depth[..., None] * directions, scene.points_world)
    origins, unit = g.pixel_rays(scene.intrinsics, to_world, (4, 6))
    distance = g.depth_to_ray_distance(scene.depth, scene.intrinsics)
    torch.testing.assert_close(g.points_along_rays(origins, unit, distance), scene.points_world)


@given(seeds, st.floats(-3, 3))
def test_moments_do_not_depend_on_the_point_of_the_ray(seed: int, step: float) -> None:
    scene = random_scene(seed)
    origins, directions = g.pixel_rays(scene.intrinsics, g.invert_se3(scene.world_to_camera), (4, 6))
    moments = g.ray_moments(origins, directions)
    torch.testing.assert_close(g.ray_moments(origins + step * directions, directions), moments)
    torch.testing.assert_close((moments * directions).sum(-1), torch.zeros(2, 3, 4, 6, dtype=torch.float64))


@given(seeds)
def test_rays_of_a_camera_meet_in_its_centre_even_with_outliers_weighted_out(seed: int) -> None:
    scene = random_scene(seed, size=(6, 6))
    origins, endpoints = (x.flatten(2, 3) for x in scene_rays(scene))
    directions = endpoints - origins
    somewhere = origins + directions * torch.rand(2, 3, 36, 1, dtype=torch.float64)
    weights = torch.ones(2, 3, 36, dtype=torch.float64)
    somewhere[..., 0, :], weights[..., 0] = 100.0, 0.0
    centers = g.camera_centers(scene.world_to_camera)
    torch.testing.assert_close(g.intersect_rays(somewhere, directions, weights), centers)
    assert not torch.allclose(g.intersect_rays(somewhere, directions), centers, atol=1e-2)


def test_parallel_rays_give_a_finite_point() -> None:
    directions = torch.tensor([0.0, 0, 1]).expand(5, 3)
    assert g.intersect_rays(torch.randn(5, 3), directions).isfinite().all()


@given(seeds)
def test_cut3r_ray_maps_depend_on_relative_pose_alone(seed: int) -> None:
    scene = random_scene(seed)
    move = random_similarity(seed + 1, 2)._replace(scale=torch.ones(2, dtype=torch.float64))

    def ray_map(cameras: torch.Tensor, **options: bool) -> torch.Tensor:
        to_world = g.invert_se3(cameras)
        first = to_world[:, :1].expand_as(to_world)
        return g.cut3r_ray_map(scene.intrinsics, to_world, first, (4, 6), **options)

    maps = ray_map(scene.world_to_camera)
    torch.testing.assert_close(ray_map(move_world(scene.world_to_camera, move)), maps)
    torch.testing.assert_close(maps[:, 0, ..., :3], torch.zeros(2, 4, 6, 3, dtype=torch.float64))
    meant = ray_map(scene.world_to_camera, add_translation=False)
    torch.testing.assert_close(meant[:, 0], maps[:, 0])  # the reference view has no translation to add
    assert not torch.allclose(meant[:, 1], maps[:, 1], atol=1e-2)
    _, directions = g.pixel_rays(scene.intrinsics, g.invert_se3(g.to_first_camera(scene.world_to_camera)), (4, 6))
    torch.testing.assert_close(meant[..., 3:], directions)


def test_rays_are_differentiable_where_targets_of_losses_are_made() -> None:
    scene = random_scene(0, batch=1, views=1, size=(2, 2))
    depth, cameras = scene.depth.requires_grad_(), scene.world_to_camera.requires_grad_()

    def encode(depth: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
        return g.encode_rays(*scene_rays(Scene(cameras, scene.intrinsics, depth)))

    assert torch.autograd.gradcheck(encode, (depth, cameras))


def test_directions_of_half_precision_inputs_are_computed_in_float32() -> None:
    scene = random_scene(0, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, directions = g.pixel_rays(scene.intrinsics, g.invert_se3(scene.world_to_camera), (4, 6))
    _, want = g.pixel_rays(scene.intrinsics.double(), g.invert_se3(scene.world_to_camera.double()), (4, 6))
    assert directions.dtype == torch.float32
    torch.testing.assert_close(directions.double(), F.normalize(want, dim=-1), atol=1e-6, rtol=0)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"camera_to_world: expected shape \[..., 3, 4\]"):
        g.pixel_rays(torch.eye(3), torch.eye(4), (2, 2))
