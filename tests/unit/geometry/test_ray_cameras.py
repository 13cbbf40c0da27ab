from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multiview_cases import random_rotations
from restrike import geometry as g

PATCHES = 12
seeds = st.integers(0, 10**6)


def bundles(seed: int, off_centre: float = 0.1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """True cameras anywhere on the sphere, and their rays: [2, 3] views of 144 patches, NDC coordinates."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, 3, *shape, generator=generator, dtype=dtype)

    cameras = g.make_se3(random_rotations(generator, 2, 3, dtype=dtype), draw(3))
    intrinsics = g.make_intrinsics(3 + 0.3 * draw(2).tanh(), off_centre * draw(2))
    coords = g.patch_centers(torch.tensor([0.0, 0, 2, 1], dtype=dtype).expand(2, 3, 4), PATCHES)
    origins, endpoints = g.ray_origins_and_endpoints(coords, 3 + draw(PATCHES, PATCHES).tanh(), intrinsics, cameras)
    return cameras, intrinsics, coords.flatten(2, 3), origins.flatten(2, 3), endpoints.flatten(2, 3)


def degrees_off(cameras: Tensor, true: Tensor) -> Tensor:
    return torch.rad2deg(g.rotation_angle(g.multiply(cameras[..., :3], true[..., :3].mT)))


@given(seeds, st.booleans(), st.sampled_from(["mean", "intersection"]))
def test_exact_rays_give_back_pose_focal_lengths_and_principal_point(seed: int, is_robust: bool, center: str) -> None:
    cameras, intrinsics, coords, origins, endpoints = bundles(seed)
    got = g.cameras_from_rays(origins, endpoints, coords, center, is_robust)  # type: ignore[arg-type]
    torch.testing.assert_close(got.world_to_camera, cameras, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.intrinsics, intrinsics, atol=1e-6, rtol=1e-6)


@given(seeds)
def test_known_intrinsics_give_back_the_pose(seed: int) -> None:
    cameras, intrinsics, coords, origins, endpoints = bundles(seed)
    got = g.cameras_from_rays_known(origins, endpoints, coords, intrinsics)
    torch.testing.assert_close(got.world_to_camera, cameras, atol=1e-6, rtol=1e-6)


@given(seeds)
def test_a_third_of_wild_rays_hardly_moves_the_robust_cameras(seed: int) -> None:
    cameras, intrinsics, coords, origins, endpoints = bundles(seed)
    generator = torch.Generator().manual_seed(seed)
    wild = torch.rand(2, 3, PATCHES**2, 1, generator=generator) < 0.33
    noise = torch.randn(endpoints.shape, generator=generator, dtype=torch.float64)
    endpoints = endpoints + torch.where(wild, 2.0, 0.002) * noise
    robust = g.cameras_from_rays(origins, endpoints, coords)
    plain = g.cameras_from_rays(origins, endpoints, coords, is_robust=False)
    assert degrees_off(robust.world_to_camera, cameras).max() < 0.5
    assert (robust.intrinsics - intrinsics).abs().max() < 0.05
    assert degrees_off(plain.world_to_camera, cameras).max() > 5


@given(seeds, st.integers(1, 6))
def test_a_few_wild_rays_among_many_good_ones_are_not_overlooked(seed: int, count: int) -> None:
    cameras, _, coords, origins, endpoints = bundles(seed)
    generator = torch.Generator().manual_seed(seed)
    endpoints = endpoints + 0.002 * torch.randn(endpoints.shape, generator=generator, dtype=torch.float64)
    wild = endpoints.clone()
    wild[..., :count, :] += 2 * torch.randn(2, 3, count, 3, generator=generator, dtype=torch.float64)
    assert degrees_off(g.cameras_from_rays(origins, wild, coords).world_to_camera, cameras).max() < 0.5


@pytest.mark.parametrize(("world", "image"), [(1e6, 1.0), (1e-6, 1.0), (1.0, 1000.0), (1e6, 1000.0)])
def test_units_of_world_and_image_do_not_matter_to_the_robust_fit(world: float, image: float) -> None:
    cameras, _, coords, origins, endpoints = bundles(0)
    generator = torch.Generator().manual_seed(0)
    wild = torch.rand(2, 3, PATCHES**2, 1, generator=generator) < 0.33
    noise = torch.randn(endpoints.shape, generator=generator, dtype=torch.float64)
    endpoints = endpoints + torch.where(wild, 2.0, 0.002) * noise
    expected = g.cameras_from_rays(origins, endpoints, coords)
    got = g.cameras_from_rays(world * origins, world * endpoints, image * (coords + 1))  # pixels count from a corner
    assert degrees_off(got.world_to_camera, cameras).max() < 0.5
    torch.testing.assert_close(got.world_to_camera[..., 3] / world, expected.world_to_camera[..., 3], atol=0.05, rtol=0)
    focal = expected.intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2]
    torch.testing.assert_close(got.intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2] / image, focal, atol=0, rtol=0.02)


def dense(seed: int, noise: float, wild_share: float) -> tuple[Tensor, ...]:
    """Three cameras with 64 x 64 float32 rays each, more than the solver samples."""
    generator = torch.Generator().manual_seed(seed)
    cameras = g.make_se3(random_rotations(generator, 3, dtype=torch.float32), torch.randn(3, 3, generator=generator))
    intrinsics = g.make_intrinsics(torch.full((3, 2), 3.0), torch.zeros(3, 2))
    coords = g.patch_centers(torch.tensor([0.0, 0, 2, 1]).expand(3, 4), 64)
    origins, endpoints = g.ray_origins_and_endpoints(coords, torch.full((3, 64, 64), 3.0), intrinsics, cameras)
    is_wild = torch.rand(3, 64, 64, 1, generator=generator) < wild_share
    endpoints = endpoints + torch.where(is_wild, 2.0, noise) * torch.randn(endpoints.shape, generator=generator)
    return cameras, coords.flatten(1, 2), origins.flatten(1, 2), endpoints.flatten(1, 2)


@pytest.mark.parametrize("wild_share", [0.0, 0.1, 0.4])
def test_every_ray_of_a_dense_map_counts_and_none_of_the_wild_ones(wild_share: float) -> None:
    cameras, coords, origins, endpoints = dense(0, 0.01, wild_share)
    got = g.cameras_from_rays(origins, endpoints, coords)
    assert degrees_off(got.world_to_camera, cameras).max() < 0.15
    few = g.cameras_from_rays(*(x[:, ::16] for x in (origins, endpoints, coords)))
    assert degrees_off(got.world_to_camera, cameras).mean() < degrees_off(few.world_to_camera, cameras).mean()


def test_more_noisy_rays_bring_the_plain_fit_nearer_to_the_truth() -> None:
    means = []
    for step in (37, 1):
        errors = []
        for seed in range(8):
            cameras, *rays = dense(seed, 0.05, 0.0)
            coords, origins, endpoints = (x[:, ::step] for x in rays)
            got = g.cameras_from_rays(origins, endpoints, coords, is_robust=False)
            errors.append(degrees_off(got.world_to_camera, cameras).mean())
        means.append(torch.stack(errors).mean())
    assert means[1] < means[0] / 4  # 37 times the rays


def test_leading_dimensions_broadcast_and_blocks_do_not_show() -> None:
    cameras, coords, origins, endpoints = dense(1, 0.003, 0.02)
    alone = [g.cameras_from_rays(origins[i], endpoints[i], coords[0]).world_to_camera for i in range(3)]
    together = g.cameras_from_rays(origins[None], endpoints[None], coords[0]).world_to_camera
    assert together.shape == (1, 3, 3, 4)
    torch.testing.assert_close(together[0], torch.stack(alone))


def test_the_plain_fit_has_a_gradient() -> None:
    _, _, coords, origins, endpoints = bundles(2)
    endpoints = endpoints[0, 0] + 0.01 * torch.randn(144, 3, generator=torch.Generator().manual_seed(0)).double()
    near = endpoints.requires_grad_()
    got = g.cameras_from_rays(origins[0, 0], near, coords[0, 0], is_robust=False).world_to_camera[..., :3].sum()
    (gradient,) = torch.autograd.grad(got, near)
    step = 1e-6
    moved = endpoints.detach().clone()
    moved[5, 1] += step
    after = g.cameras_from_rays(origins[0, 0], moved, coords[0, 0], is_robust=False).world_to_camera[..., :3].sum()
    assert float(gradient[5, 1]) == pytest.approx(float(after - got.detach()) / step, rel=1e-3, abs=1e-6)


@given(seeds)
def test_turning_the_world_turns_the_cameras_and_changes_nothing_else(seed: int) -> None:
    _, _, coords, origins, endpoints = bundles(seed)
    endpoints = endpoints + 0.01 * torch.randn(endpoints.shape, generator=torch.Generator().manual_seed(seed))
    turn = random_rotations(torch.Generator().manual_seed(seed + 1))
    a = g.cameras_from_rays(origins, endpoints, coords)
    b = g.cameras_from_rays(g.rotate(turn, origins), g.rotate(turn, endpoints), coords)
    torch.testing.assert_close(b.world_to_camera[..., :3], g.multiply(a.world_to_camera[..., :3], turn.mT))
    torch.testing.assert_close(b.world_to_camera[..., 3], a.world_to_camera[..., 3])
    torch.testing.assert_close(b.intrinsics, a.intrinsics)


def test_views_do_not_influence_each_other_and_nan_stays_in_its_own() -> None:
    _, intrinsics, coords, origins, endpoints = bundles(7)
    want = g.cameras_from_rays(origins, endpoints, coords)
    endpoints = endpoints.clone()
    endpoints[1, 2, 5] = torch.nan
    solvers = (
        g.cameras_from_rays(origins, endpoints, coords),
        g.cameras_from_rays(origins, endpoints, coords, "intersection", is_robust=False),
        g.cameras_from_rays_known(origins, endpoints, coords, intrinsics),
        g.cameras_from_rays_released(origins, endpoints, coords),
    )
    for got in solvers:
        assert got.world_to_camera[0].isfinite().all()
        assert got.world_to_camera[1, 2].isnan().any()
    torch.testing.assert_close(solvers[0].world_to_camera[0], want.world_to_camera[0])


def test_the_released_triangle_is_off_by_the_principal_point_over_the_focal_length() -> None:
    cameras, intrinsics, coords, origins, endpoints = bundles(5, off_centre=0.05)
    near = torch.tensor([0.1, -0.1, 0.05], dtype=torch.float64)  # forward: the release loses side views
    forward = g.make_se3(g.axis_angle_to_matrix(near).expand(2, 3, 3, 3), cameras[..., 3])
    move = g.compose_se3(g.invert_se3(forward), cameras)
    origins, endpoints = g.transform_points(move, origins), g.transform_points(move, endpoints)
    released = g.cameras_from_rays_released(origins, endpoints, coords)
    focal, center = g.split_intrinsics(intrinsics)
    predicted_error = torch.rad2deg((center / focal).norm(dim=-1))
    torch.testing.assert_close(degrees_off(released.world_to_camera, forward), predicted_error, rtol=0.15, atol=0)
    assert degrees_off(g.cameras_from_rays(origins, endpoints, coords).world_to_camera, forward).max() < 1e-5


def test_coincident_image_coordinates_are_no_camera_but_no_crash() -> None:
    rays = torch.randn(8, 3)
    got = g.cameras_from_rays(torch.zeros(8, 3), rays, torch.zeros(8, 2))
    assert got.world_to_camera.shape == (3, 4)


def test_too_few_rays_and_unknown_centres_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 rays, got 3"):
        g.cameras_from_rays(torch.zeros(3, 3), torch.ones(3, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="'mean' or 'intersection', got 'median'"):
        g.cameras_from_rays(torch.zeros(4, 3), torch.rand(4, 3), torch.rand(4, 2), "median")  # type: ignore[arg-type]


def test_float32_maps_of_the_network_suffice() -> None:
    cameras, _, coords, origins, endpoints = bundles(3, dtype=torch.float32)
    got = g.cameras_from_rays(origins, endpoints, coords)
    assert got.world_to_camera.dtype == torch.float32
    assert degrees_off(got.world_to_camera, cameras).max() < math.degrees(1e-5)
