"""DiffusionSfM's table: what is averaged in which order."""

from __future__ import annotations

import math

import pytest
import torch

from multiview_cases import move_world, random_scene, random_similarity
from restrike import geometry as g
from restrike.metrics.pose_table import SceneScore, format_pose_table, pose_table, score_cameras, score_points


def score(category: str, order: int, value: float, views: int = 2, chamfer: float = 0.5) -> SceneScore:
    return SceneScore(category, f"{value}", order, views, value, value, chamfer, math.nan)


def test_shares_are_averaged_over_sequences_then_categories_then_orders():
    # Apples: 1 and 0 in the first order, 1 in the second; one cup: 0.5, then 1.
    scores = [score("apple", 0, 1.0), score("apple", 0, 0.0), score("cup", 0, 0.5)]
    scores += [score("apple", 1, 1.0), score("cup", 1, 1.0)]
    table = pose_table(scores)
    assert table[2]["rra@15"] == pytest.approx(((0.5 + 0.5) / 2 + 1) / 2)
    assert table[2]["scenes"] == 5


def test_chamfer_takes_medians_and_leaves_out_scenes_without_points():
    chamfers = {"apple": (0.1, 0.2, 9.0), "cup": (0.4, math.nan, 0.6), "car": (7.0,)}
    scores = [score(name, 0, 1.0, chamfer=value) for name, values in chamfers.items() for value in values]
    row = pose_table(scores)[2]
    assert row["chamfer"] == pytest.approx(0.5)  # the median of 0.2, 0.5 and 7
    assert math.isnan(row["chamfer_object"])


def test_categories_and_views_stand_apart_in_the_table():
    scores = [score("apple", 0, 1.0), score("ball", 0, 0.25), score("ball", 0, 0.75, views=8)]
    seen, unseen = pose_table(scores, {"apple"}), pose_table(scores, {"ball"})
    assert list(seen) == [2] and list(unseen) == [2, 8] and pose_table(scores, {"car"}) == {}
    text = format_pose_table({"seen": seen, "unseen": unseen})
    assert text.splitlines()[0] == "|  | N = 2 | N = 8 |"
    assert "| seen R@15 | 1.000 |  |" in text and "| unseen R@15 | 0.250 | 0.750 |" in text


def test_a_prediction_in_another_world_and_scale_is_right_and_a_lost_one_is_wrong():
    scene = random_scene(0, views=5, batch=1)
    true = scene.world_to_camera
    moved = move_world(true, random_similarity(1, 1))
    assert score_cameras(moved[0], true[0]) == (1.0, 1.0)
    lost = moved[0].clone()
    lost[0, :, :3] = g.axis_angle_to_matrix(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)) @ lost[0, :, :3]
    rotation, center = score_cameras(lost, true[0])
    assert rotation == pytest.approx(6 / 10)  # the four pairs of the first view
    nan = torch.full_like(lost, math.nan)
    assert score_cameras(nan, true[0]) == (0.0, 0.0)


def test_points_are_compared_where_the_mask_says_after_one_similarity():
    scene = random_scene(2, views=2, batch=1, size=(12, 12))
    true, mask = scene.points_world[0], scene.depth[0] > 2.5
    predicted = random_similarity(3, 1).apply(true[None])[0]
    predicted[~mask] = 1e6
    assert score_points(predicted, true, mask) < 1e-12
    assert score_points(predicted + 0.1 * torch.randn_like(predicted), true, mask, max_points=50) > 1e-4
    assert math.isnan(score_points(predicted, true, torch.zeros_like(mask)))
    predicted[mask] = math.nan
    assert score_points(predicted, true, mask) == math.inf
