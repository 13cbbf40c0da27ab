"""VGGT's metrics as one object: what is perfect, what is trivial, what similarity and padding change."""

from __future__ import annotations

import math

import pytest
import torch

from distributed import run_ranks
from multiview_cases import random_scene
from restrike import geometry as g
from restrike.geometry import invert_se3, make_se3, unproject_depth
from restrike.metrics import MultiViewMetrics, PointErrors
from restrike.metrics.camera_pose import camera_scene_scale, pairwise_pose_errors
from restrike.metrics.multiview import mean_cameras, trivial_cameras

CATEGORIES = ("apple", "ball", "cup")


def scene(seed: int, batch: int = 2):
    """Depth in front of the cameras, all in float32."""
    drawn = random_scene(seed, views=4, batch=batch, size=(8, 10), dtype=torch.float32)
    return drawn._replace(depth=drawn.depth.abs())


def update(metrics: MultiViewMetrics, truth, cameras=None, depth=None, names=("apple", "cup"), **more) -> None:
    metrics.update(
        (truth.world_to_camera if cameras is None else cameras, truth.world_to_camera),
        (truth.depth if depth is None else depth, truth.depth),
        (truth.intrinsics, truth.intrinsics),
        names,
        **more,
    )


def test_the_truth_is_perfect_at_every_threshold():
    metrics = MultiViewMetrics(CATEGORIES, points=True)
    update(metrics, scene(0))
    values = metrics.compute()
    for name in ("auc@3", "auc@30", "rra@5", "rta@5", "auc@30_invariant", "delta@1.25"):
        assert float(values[name]) == pytest.approx(1.0)
    for name in ("abs_rel", "rmse", "point_accuracy", "point_completeness", "point_overall"):
        assert float(values[name]) == pytest.approx(0.0, abs=1e-4)


def test_depth_up_to_a_factor_and_cameras_of_another_world_are_as_good():
    truth, metrics = scene(1), MultiViewMetrics(CATEGORIES, points=True)
    cameras = make_se3(truth.world_to_camera[..., :3], 3 * truth.world_to_camera[..., 3])
    update(metrics, truth, cameras, 3 * truth.depth)
    values = metrics.compute()
    assert float(values["abs_rel"]) == pytest.approx(0, abs=1e-6)
    assert float(values["point_overall"]) == pytest.approx(0, abs=1e-4)


def test_cameras_in_one_place_have_no_direction_between_them():
    truth = scene(2)
    errors = pairwise_pose_errors(trivial_cameras(truth.world_to_camera), truth.world_to_camera)
    assert torch.equal(errors.translation, torch.full_like(errors.translation, math.pi / 2))
    assert bool((errors.rotation > 0).all())


def test_the_trivial_predictor_gets_no_pair_right_and_the_spread_of_depth_wrong():
    truth, metrics = scene(3), MultiViewMetrics(CATEGORIES)
    update(metrics, truth, trivial_cameras(truth.world_to_camera), torch.ones_like(truth.depth))
    values = metrics.compute()
    assert float(values["auc@30"]) == 0 and float(values["abs_rel"]) > 0.02


def test_unknown_depth_and_categories_that_never_came_do_not_count():
    truth, metrics = scene(4), MultiViewMetrics(CATEGORIES, points=True)
    truth.depth[:, :, :2] = 0
    guess = truth.depth.clone()
    guess[:, :, :2] = 100
    update(metrics, truth, depth=guess)
    values = metrics.compute()
    assert float(values["abs_rel"]) == 0 and float(values["auc@30"]) == 1
    assert float(values["point_overall"]) == pytest.approx(0, abs=1e-4)


def test_losses_are_averaged_over_scenes():
    metrics = MultiViewMetrics(CATEGORIES, losses=("loss",))
    update(metrics, scene(5), losses={"loss": torch.tensor(1.0)})
    update(metrics, scene(6, batch=1), names=("cup",), losses={"loss": torch.tensor(4.0)})
    assert float(metrics.compute()["loss"]) == pytest.approx(2.0)
    metrics.reset()
    update(metrics, scene(5), losses={"loss": torch.tensor(3.0)})
    assert float(metrics.compute()["loss"]) == pytest.approx(3.0)


def test_thinned_clouds_say_nearly_the_same():
    truth = scene(7, batch=1)
    points = unproject_depth(truth.depth, truth.intrinsics, invert_se3(truth.world_to_camera))
    noisy = points + 0.05 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0))
    values = []
    for max_points in (10_000, 80):
        metric = PointErrors(max_points)
        metric.update(noisy, points, truth.depth > 0)
        values.append(float(metric.compute()["point_overall"]))
    assert values[0] > 0.01 and values[0] < values[1] < 4 * values[0]


def _share(rank: int) -> dict[str, torch.Tensor]:
    torch.distributed.init_process_group("gloo")
    metrics = MultiViewMetrics(CATEGORIES, losses=("loss",), points=True)
    if rank == 0:
        truth = scene(8)
        update(metrics, truth, depth=truth.depth**1.1, losses={"loss": torch.tensor(2.0)})
    return metrics.compute()


def test_a_rank_without_scenes_takes_part():
    alone = MultiViewMetrics(CATEGORIES, losses=("loss",), points=True)
    truth = scene(8)
    update(alone, truth, depth=truth.depth**1.1, losses={"loss": torch.tensor(2.0)})
    expected = alone.compute()
    for values in run_ranks(_share):
        assert values.keys() == expected.keys()
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_the_mean_motion_is_that_of_scenes_that_all_move_alike() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    walk = g.make_se3(g.axis_angle_to_matrix(0.4 * draw(4, 3)), draw(4, 3))
    worlds = g.make_se3(g.axis_angle_to_matrix(draw(5, 1, 3)), draw(5, 1, 3))
    scenes = g.compose_se3(walk, worlds)
    scenes[..., 3] *= torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])[:, None, None]  # each in a unit of its own
    mean = mean_cameras(scenes)
    first = g.compose_se3(walk, g.invert_se3(walk[:1]))
    torch.testing.assert_close(mean[:, :, :3], first[:, :, :3])
    torch.testing.assert_close(mean[:, :, 3], first[:, :, 3] / camera_scene_scale(first))
