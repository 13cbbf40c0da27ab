"""What CUT3R's objective does and does not see."""

from __future__ import annotations

import pytest
import torch

from cut3r_cases import recorded_predictions, recorded_targets
from restrike import geometry as g
from restrike.losses.recurrent import RecurrentTargets, recurrent_errors, recurrent_loss, recurrent_targets
from restrike.models.cut3r import Predictions

META = {"tag": "loss", "V": 3, "B": 2, "H": 6, "W": 8, "flags": {"metric": [False, False]}}


@pytest.fixture
def predictions() -> Predictions:
    return Predictions(*(x.detach() for x in recorded_predictions(META)))


@pytest.fixture
def targets() -> RecurrentTargets:
    return recorded_targets(META)


def scaled(predictions: Predictions, factor: float) -> Predictions:
    poses = torch.cat([factor * predictions.poses[..., :3], predictions.poses[..., 3:]], dim=-1)
    points = {name: factor * getattr(predictions, name) for name in ("points_camera", "points_world")}
    return predictions._replace(**points, poses=poses)


def flags(**values: list[bool]) -> dict[str, torch.Tensor]:
    return {f"is_{name}": torch.tensor(value) for name, value in values.items()}


def test_the_unit_of_a_prediction_is_free_but_in_metres(predictions, targets):
    loss = recurrent_loss(predictions, targets)["loss"]
    torch.testing.assert_close(recurrent_loss(scaled(predictions, 3.0), targets)["loss"], loss)
    metric = targets._replace(**flags(metric=[True, True]))
    assert recurrent_loss(scaled(predictions, 3.0), metric)["loss"] > recurrent_loss(predictions, metric)["loss"] + 0.1


def test_the_world_of_the_truth_is_free(predictions):
    targets = recorded_targets(META)
    move = g.make_se3(g.axis_angle_to_matrix(torch.tensor([0.3, -0.2, 1.0])), torch.tensor([1.0, 2, 3]))
    points = torch.randn(2, 3, 6, 8, 3, generator=torch.Generator().manual_seed(0))
    losses = []
    for world in (torch.eye(3, 4), move):
        given = g.transform_points(world.expand(2, 3, 3, 4), points), g.compose_se3(world, targets.poses)
        moved = recurrent_targets(*given, targets.valid, targets.sky, targets.images)
        losses.append(recurrent_loss(predictions, moved)["loss"])
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


def test_pixels_of_unknown_depth_have_no_gradient_whatever_they_hold(predictions, targets):
    unknown = ~(targets.valid | targets.sky)
    spoilt = targets._replace(points_camera=torch.where(unknown[..., None], torch.nan, targets.points_camera))
    inputs = [x.requires_grad_() for x in predictions]
    loss = recurrent_loss(Predictions(*inputs), spoilt)["loss"]
    gradients = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(loss, recurrent_loss(predictions, targets)["loss"])
    assert all(x.isfinite().all() for x in gradients)
    for i in (0, 1, 2, 3):
        assert not gradients[i][unknown].any()


def test_the_sky_counts_as_an_error_of_two_and_pulls_confidence_down(predictions, targets):
    sky = targets._replace(valid=torch.zeros_like(targets.valid), sky=torch.ones_like(targets.valid))
    parts = recurrent_loss(predictions, sky)
    torch.testing.assert_close(parts["distance_world"], torch.full((3,), 2.0))
    inputs = [x.requires_grad_() for x in predictions]
    gradients = torch.autograd.grad(recurrent_loss(Predictions(*inputs), sky)["loss"], inputs, allow_unused=True)
    assert bool((gradients[1] > 0).all()) and bool((gradients[3] > 0).all())
    assert not gradients[0].any() and not gradients[2].any()


def test_a_batch_of_cameras_only_has_a_finite_loss_without_cross_terms(predictions, targets):
    cameras = targets._replace(**flags(camera_only=[True, True]))
    parts = recurrent_loss(predictions, cameras)
    assert parts["loss"].isfinite()
    assert not parts["loss_world"].any()
    rays = predictions._replace(points_camera=predictions.points_camera * 1.7)  # the same directions
    torch.testing.assert_close(recurrent_loss(rays, cameras)["loss_camera"], parts["loss_camera"])


def test_relative_depth_ignores_scale_shift_and_directions(predictions, targets):
    depth = targets._replace(**flags(depth_only=[True, True]), sky=torch.zeros_like(targets.sky))
    before = recurrent_loss(predictions, depth)["distance_camera"]
    points = predictions.points_camera.clone()
    points[..., :2] += 5
    points[..., 2] = 2 * points[..., 2] + 3
    after = recurrent_loss(predictions._replace(points_camera=points), depth)["distance_camera"]
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-4)
    static = recurrent_loss(predictions._replace(points_camera=points), depth, is_mixed=False)["distance_camera"]
    assert not torch.allclose(static, after)


def test_single_views_have_a_unit_each(predictions, targets):
    single = targets._replace(**flags(single_view=[True, True]), sky=torch.zeros_like(targets.sky))
    factors = torch.tensor([1.0, 4.0, 0.3]).view(1, 3, 1, 1, 1)
    other = predictions._replace(points_camera=predictions.points_camera * factors)
    torch.testing.assert_close(
        recurrent_loss(predictions, single)["distance_camera"], recurrent_loss(other, single)["distance_camera"]
    )


def test_the_pose_of_a_view_without_image_is_left_out_or_the_sample_as_released(predictions, targets):
    mask = torch.tensor([[True, False, True], [True, True, True]])
    wrong = predictions._replace(poses=predictions.poses.clone())
    wrong.poses[0, 1] += 1
    hidden = targets._replace(image_mask=mask)

    def pose_loss(p: Predictions, **arguments: bool) -> torch.Tensor:
        return recurrent_loss(p, hidden, **arguments)["loss_pose"]

    torch.testing.assert_close(pose_loss(predictions), pose_loss(wrong))
    assert not torch.allclose(*(pose_loss(p, released_pose_mask=True) for p in (predictions, wrong)))
    last = targets._replace(image_mask=mask.flip(1) & torch.tensor([True, True, False]))
    kept = recurrent_loss(predictions, last, released_pose_mask=True)["loss_pose"]
    assert float(kept) == 0.0


def test_errors_of_the_truth_are_zero_and_a_unit_does_not_change_the_scale_invariant_ones(predictions, targets):
    perfect = predictions._replace(
        points_camera=targets.points_camera,
        points_world=targets.points_world,
        poses=g.encode_pose(targets.poses),
        colors=targets.images.movedim(2, -1),
    )
    assert float(recurrent_errors(perfect, targets)["loss"]) == pytest.approx(0, abs=1e-4)
    one, two = recurrent_errors(predictions, targets), recurrent_errors(scaled(predictions, 2.0), targets)
    torch.testing.assert_close(one["scale_invariant_world"], two["scale_invariant_world"])
    assert not torch.allclose(one["distance_world"], two["distance_world"])
