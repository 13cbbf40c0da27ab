from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multiview_cases import random_scene, random_similarity
from restrike import geometry as g

seeds = st.integers(0, 10**6)


def cloud(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds)
def test_umeyama_finds_the_similarity_that_was_applied(seed: int) -> None:
    source, move = cloud(seed, 2, 10), random_similarity(seed, 2)
    fit = g.umeyama(source, move.apply(source))
    for got, want in zip(fit, move, strict=True):
        torch.testing.assert_close(got, want)


@given(seeds)
def test_no_similarity_near_the_fit_is_better(seed: int) -> None:
    source, target = cloud(seed, 20), cloud(seed + 1, 20)
    weights = torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def loss(fit: g.Similarity) -> Tensor:
        return (weights * (fit.apply(source) - target).square().sum(-1)).sum()

    fit = g.umeyama(source, target, weights)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        nudge = 0.01 * torch.randn(7, generator=generator, dtype=torch.float64)
        rotation = g.multiply(g.axis_angle_to_matrix(nudge[:3]), fit.rotation)
        nearby = g.Similarity(fit.scale * nudge[3].exp(), rotation, fit.translation + nudge[4:])
        assert loss(nearby) >= loss(fit)


def test_a_mirrored_cloud_is_not_mirrored_back() -> None:
    source = cloud(0, 30)
    fit = g.umeyama(source, source * torch.tensor([-1.0, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.det(fit.rotation), torch.ones((), dtype=torch.float64))


def test_points_of_no_weight_may_be_nan_and_others_may_not() -> None:
    source, move = cloud(0, 2, 10), random_similarity(0, 2)
    target, weights = move.apply(source), torch.ones(2, 10, dtype=torch.float64)
    source[0, 3], weights[0, 3] = torch.nan, 0.0
    fit = g.umeyama(source, target, weights)
    torch.testing.assert_close(fit.rotation, move.rotation)
    spoilt = g.umeyama(source, target)
    assert spoilt.scale[0].isnan()
    torch.testing.assert_close(spoilt.rotation[1], move.rotation[1])


def test_two_points_align_exactly_and_one_place_gives_scale_zero() -> None:
    source, target = cloud(0, 2), cloud(1, 2)
    torch.testing.assert_close(g.umeyama(source, target).apply(source), target)
    fit = g.umeyama(torch.ones(5, 3), cloud(0, 5).float())
    assert fit.scale == 0
    assert torch.cat([x.flatten() for x in fit]).isfinite().all()


def test_a_rigid_fit_leaves_scale_alone() -> None:
    source = cloud(0, 10)
    fit = g.umeyama(source, 3 * source, with_scale=False)
    assert fit.scale == 1
    torch.testing.assert_close(fit.rotation, torch.eye(3, dtype=torch.float64))


def test_cameras_move_with_the_world_they_stand_in() -> None:
    scene, move = random_scene(0), random_similarity(0, 2)
    cameras = g.invert_se3(move.apply_to_cameras(g.invert_se3(scene.world_to_camera)))
    seen = g.transform_points(cameras, move.apply(scene.points_world))
    want = g.transform_points(scene.world_to_camera, scene.points_world) * move.scale[:, None, None, None, None]
    torch.testing.assert_close(seen, want)


def test_gradients_of_the_alignment_equal_finite_differences() -> None:
    source, target = cloud(0, 6).requires_grad_(), cloud(1, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: g.umeyama(a, b).apply(a), (source, target))


def test_clouds_that_do_not_correspond_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target: expected shape \[..., 5, 3\], got \[4, 3\]"):
        g.umeyama(torch.zeros(5, 3), torch.zeros(4, 3))


@pytest.mark.parametrize("views", [1, 2, 5])
def test_cameras_of_any_number_and_on_a_line_are_aligned(views: int) -> None:
    poses = g.invert_se3(random_scene(1, views=views, batch=2).world_to_camera)
    poses[..., 3] = poses[:, :1, :, 3] + torch.arange(views)[:, None] * poses.new_tensor([1.0, 2.0, 3.0])
    move = random_similarity(4, 2)
    moved = move.apply_to_cameras(poses)
    fit = g.align_cameras(poses, moved)
    torch.testing.assert_close(fit.apply_to_cameras(poses), moved)
    torch.testing.assert_close(fit.scale, move.scale if views > 1 else torch.ones_like(fit.scale))
