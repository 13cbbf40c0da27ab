from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multiview_cases import Scene, move_world, random_scene, random_similarity
from restrike import geometry as g

seeds = st.integers(0, 10**6)


def moved(scene: Scene, seed: int) -> tuple[Scene, g.Similarity]:
    """The same scene in another world and unit."""
    move = random_similarity(seed, 2)
    depth = scene.depth * move.scale[:, None, None, None]
    return Scene(move_world(scene.world_to_camera, move), scene.intrinsics, depth), move


def mask(scene: Scene, seed: int) -> Tensor:
    return torch.rand(scene.depth.shape, generator=torch.Generator().manual_seed(seed)) > 0.3


@given(seeds)
def test_vggts_targets_do_not_depend_on_world_and_unit_of_the_data(seed: int) -> None:
    scene = random_scene(seed)
    other, _ = moved(scene, seed)
    valid = mask(scene, seed)
    a, b = (g.normalize_to_mean_distance(s.world_to_camera, s.points_world, s.depth, valid) for s in (scene, other))
    # The published 0.001 beside the count is the same for both.
    for got, want in zip(a[:3], b[:3], strict=True):
        torch.testing.assert_close(got, want)


@given(seeds)
def test_vggts_targets_agree_with_each_other_and_have_unit_mean_distance(seed: int) -> None:
    scene = random_scene(seed)
    valid = mask(scene, seed)
    target = g.normalize_to_mean_distance(scene.world_to_camera, scene.points_world, scene.depth, valid)
    lifted = g.unproject_depth(target.depth, scene.intrinsics, g.invert_se3(target.world_to_camera))
    torch.testing.assert_close(lifted, target.points_world)
    for points, used in zip(target.points_world, valid, strict=True):
        assert points[used].norm(dim=-1).mean().item() == pytest.approx(1, abs=1e-3)


def test_values_that_are_not_finite_become_zero_and_masked_ones_do_not_count() -> None:
    scene = random_scene(0)
    valid = mask(scene, 0)
    points, depth = scene.points_world, scene.depth.clone()
    want = g.normalize_to_mean_distance(scene.world_to_camera, points, depth, valid)
    points[~valid], depth[~valid] = torch.nan, torch.inf
    got = g.normalize_to_mean_distance(scene.world_to_camera, points, depth, valid)
    torch.testing.assert_close(got.scale, want.scale)
    assert (got.points_world[~valid] == 0).all() and (got.depth[~valid] == 0).all()
    torch.testing.assert_close(got.points_world[valid], want.points_world[valid])


def test_a_scene_without_points_has_the_published_unit_and_spares_the_others() -> None:
    scene = random_scene(0)
    valid = mask(scene, 0)
    want = g.normalize_to_mean_distance(scene.world_to_camera, scene.points_world, scene.depth, valid)
    valid[0] = False
    got = g.normalize_to_mean_distance(scene.world_to_camera, scene.points_world, scene.depth, valid)
    assert got.scale[0] == 1e-6
    torch.testing.assert_close(got.points_world[1], want.points_world[1])


@given(seeds)
def test_diffusionsfms_scene_does_not_depend_on_the_unit_and_lies_at_distance_one(seed: int) -> None:
    scene = random_scene(seed)
    coords = g.pixel_grid(4, 6, dtype=torch.float64).expand(2, 3, 4, 6, 2)
    target = g.normalize_to_first_view_median(scene.world_to_camera, scene.depth, scene.intrinsics, coords)
    factor = random_similarity(seed, 2).scale
    cameras = g.make_se3(scene.world_to_camera[..., :3], scene.world_to_camera[..., 3] * factor[:, None, None])
    other = g.normalize_to_first_view_median(
        cameras, scene.depth * factor[:, None, None, None], scene.intrinsics, coords
    )
    torch.testing.assert_close(other.depth, target.depth)
    torch.testing.assert_close(other.world_to_camera, target.world_to_camera)
    # The median is per coordinate of the data's own world, which is why a turned world is not the same.
    world = scene.points_world[:, 0].flatten(1, 2).median(dim=1).values
    distance = (world - g.camera_centers(scene.world_to_camera[:, 0])).norm(dim=-1)
    torch.testing.assert_close(target.scale * distance, torch.ones(2, dtype=torch.float64))


def test_a_camera_inside_its_points_keeps_its_unit() -> None:
    scene = random_scene(0)
    coords = g.pixel_grid(4, 6, dtype=torch.float64).expand(2, 3, 4, 6, 2)
    tiny = g.normalize_to_first_view_median(scene.world_to_camera, scene.depth * 1e-5, scene.intrinsics, coords)
    assert torch.equal(tiny.scale, torch.ones(2, dtype=torch.float64))


@given(seeds, st.floats(0.1, 50))
def test_cut3rs_units_scale_with_the_points_and_ignore_masked_nan(seed: int, factor: float) -> None:
    scene = random_scene(seed)
    points, valid = scene.points_world, mask(scene, seed)
    confidence = 1 + torch.rand(valid.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    by_confidence = partial(g.confidence_weighted_distance, valid=valid, confidence=confidence)
    for unit in (by_confidence, partial(g.distance_to_median, valid=valid)):
        want = unit(points)
        torch.testing.assert_close(unit(points * factor), want * factor)
        spoilt = torch.where(valid[..., None], points, torch.nan)
        torch.testing.assert_close(unit(spoilt), want)


def test_equal_confidence_weighs_nothing_and_gradients_reach_points_not_confidence() -> None:
    scene = random_scene(0, batch=1, views=1, size=(2, 2))
    points, valid = scene.points_world.requires_grad_(), torch.tensor([True, True, False, True]).view(1, 1, 2, 2)
    confidence = torch.full((1, 1, 2, 2), 3.0, dtype=torch.float64, requires_grad=True)
    mean = points[valid].norm(dim=-1).mean()
    got = g.confidence_weighted_distance(points, valid, confidence)
    torch.testing.assert_close(got[0], mean)
    got.sum().backward()
    assert confidence.grad is None
    assert points.grad is not None and (points.grad[~valid] == 0).all() and (points.grad[valid] != 0).any()
    assert torch.autograd.gradcheck(lambda p: g.confidence_weighted_distance(p, valid, confidence), points)


def test_nothing_valid_gives_the_smallest_unit_not_nan() -> None:
    scene = random_scene(0)
    nothing = torch.zeros_like(scene.depth, dtype=torch.bool)
    assert (g.confidence_weighted_distance(scene.points_world, nothing) == 1e-3).all()


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=9), st.integers(0, 2**9 - 1))
def test_masked_median_is_torchs_lower_median_of_what_is_left(values: list[float], bits: int) -> None:
    keep = [bool(bits >> i & 1) for i in range(len(values))]
    got = g.masked_median(torch.tensor(values), torch.tensor(keep))
    left = [v for v, k in zip(values, keep, strict=True) if k]
    if left:
        assert got == torch.tensor(left).median()
    else:
        assert got.isnan()


@given(seeds)
def test_the_first_pose_becomes_the_identity(seed: int) -> None:
    poses = g.invert_se3(random_scene(seed).world_to_camera)
    relative = g.to_first_pose(poses)
    torch.testing.assert_close(relative[:, 0], torch.eye(4, dtype=torch.float64)[:3].expand(2, 3, 4))
    torch.testing.assert_close(g.invert_se3(relative), g.to_first_camera(g.invert_se3(poses)))


def test_gradients_of_vggts_normalisation_equal_finite_differences() -> None:
    scene = random_scene(0, batch=1, views=2, size=(2, 2))
    inputs = scene.world_to_camera.requires_grad_(), scene.points_world.detach().requires_grad_(), scene.depth
    valid = torch.ones_like(scene.depth, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda e, p: g.normalize_to_mean_distance(e, p, inputs[2], valid)[:2], inputs[:2])
