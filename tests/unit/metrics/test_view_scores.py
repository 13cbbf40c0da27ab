"""Depth and points are compared where the published evaluations compare them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from parity_tools import normal
from restrike.metrics.view_scores import (
    TrajectoryScore,
    VideoDepthScore,
    ViewAnswer,
    ViewTruth,
    known_depth,
    true_points,
)

POSE = torch.eye(3, 4, dtype=torch.float64)


def answer(depth=None, points=None, box=(0.0, 0.0, 45.0, 31.0)) -> ViewAnswer:
    return ViewAnswer(POSE, depth, points, torch.tensor(box))


def test_predictions_are_resized_cubically_as_opencv_does():
    predicted, true = 3 + normal("vs/p", 24, 32), torch.ones(31, 45)
    found, _ = known_depth(answer(predicted), ViewTruth((31, 45), depth=true))
    want = cv2.resize(predicted.numpy(), (45, 31), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(found.view(31, 45).numpy(), want, atol=2e-5)


def test_only_known_pixels_inside_the_crop_are_compared():
    true = torch.arange(1.0, 31 * 45 + 1).view(31, 45)
    predicted = true[2:22, 4:24].clone()
    true[5, 7], true[6, 8], true[7, 9] = 0, torch.inf, -1
    box = (4.0, 2.0, 24.0, 22.0)
    found, known = known_depth(answer(predicted, box=box), ViewTruth((31, 45), depth=true))
    assert len(known) == 20 * 20 - 3
    torch.testing.assert_close(found, known)


def test_a_crop_that_reaches_beyond_the_picture_is_cut_to_it():
    true = torch.arange(1.0, 31 * 45 + 1).view(31, 45)
    padded = torch.nn.functional.pad(true, (3, 2, 4, 1), value=-5)
    found, known = known_depth(answer(padded, box=(-3.0, -4.0, 47.0, 32.0)), ViewTruth((31, 45), depth=true))
    torch.testing.assert_close(found, true.flatten())
    torch.testing.assert_close(known, true.flatten())


def test_a_truth_of_another_resolution_than_its_picture_is_found_all_the_same():
    true = torch.arange(1.0, 621).view(20, 31)
    found, known = known_depth(answer(true, box=(0.0, 0.0, 62.0, 40.0)), ViewTruth((40, 62), depth=true))
    torch.testing.assert_close(found, known)
    assert len(known) == 620


def test_true_points_are_those_of_the_nearest_pixels_and_the_scaled_camera():
    """As CUT3R's evaluation prepares 640 x 480 at 512 x 384: centres at integers, scaled about the corners."""
    depth = (2 + normal("vs/t", 480, 640).abs()).numpy()
    depth[:100] = 0
    focal, center = 525.0, (320.0, 240.0)
    intrinsics = torch.tensor(
        [[focal, 0, center[0] + 0.5], [0, focal, center[1] + 0.5], [0, 0, 1]], dtype=torch.float64
    )
    true = ViewTruth((480, 640), POSE, torch.from_numpy(depth), intrinsics)
    points, mask = true_points(answer(points=torch.zeros(384, 512, 3), box=(0.0, 0.0, 640.0, 480.0)), true)
    z = cv2.resize(depth, (512, 384), interpolation=cv2.INTER_NEAREST)
    u, v = np.meshgrid(np.arange(512), np.arange(384))
    f, cx, cy = focal * 0.8, (center[0] + 0.5) * 0.8 - 0.5, (center[1] + 0.5) * 0.8 - 0.5
    want = np.stack([(u - cx) * z / f, (v - cy) * z / f, z], axis=-1)
    np.testing.assert_array_equal(mask.numpy(), z > 0)
    np.testing.assert_allclose(points.numpy(), want, atol=1e-5)


def test_one_scale_serves_all_frames_of_a_video():
    score = VideoDepthScore(("scale",))
    for factor, value in ((1.0, 2.0), (2.0, 4.0)):  # no single scale mends both frames
        true = torch.full((31, 45), value)
        score.add(answer(factor * true), ViewTruth((31, 45), depth=true))
    score.finish()
    mixed = float(score.compute()["abs_rel_scale"])
    assert mixed == pytest.approx(0.25, abs=1e-3)  # the far frame wins: |0.5 · 2 - 2| / 2 of the other half
    for factor, value in ((1.0, 2.0), (2.0, 4.0)):  # two sequences have a scale each
        true = torch.full((31, 45), value)
        score.add(answer(factor * true), ViewTruth((31, 45), depth=true))
        score.finish()
    assert float(score.compute()["abs_rel_scale"]) == pytest.approx(mixed / 2, abs=1e-3)


def test_frames_without_truth_are_shown_and_not_compared():
    score = TrajectoryScore()
    poses = [POSE.clone() for _ in range(5)]
    for number, pose in enumerate(poses):
        pose[:, 3] = torch.tensor([number, number**2, 0.1 * number**3])
        truth = None if number == 2 else 2 * pose - torch.cat([pose[:, :3], torch.zeros(3, 1)], dim=1)
        wrong = pose + 9 if number == 2 else pose
        score.add(ViewAnswer(wrong, None, None, torch.zeros(4)), ViewTruth((1, 1), truth))
    score.finish()
    assert float(score.compute()["ate"]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="needs 3 known poses, got 0"):
        score.finish()
