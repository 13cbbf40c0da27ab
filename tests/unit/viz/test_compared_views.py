"""Sheets of predicted depth, points and cameras beside the true ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from multiview_cases import move_world, random_scene, random_similarity
from restrike.viz.compared_views import ROWS, compare_views
from restrike.viz.scene import SceneViews

TILE, GAP = 32, 4


@pytest.fixture
def scene() -> SceneViews:
    drawn = random_scene(3, views=3, batch=1, size=(32, 32), dtype=torch.float32)
    depth = drawn.depth[0].abs() + 0.5
    depth[:, :5] = 0
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = ["frame 2", "frame 5", "frame 9"]
    return SceneViews("apple/1", labels, images, depth, drawn.intrinsics[0], drawn.world_to_camera[0])


def panels(sheet: np.ndarray) -> list[np.ndarray]:
    """[TILE, views, TILE, 3] of each row."""
    left, top = 76, 32
    rows = [sheet[top + row * (TILE + GAP) :][:TILE, left : left + 3 * (TILE + GAP)] for row in range(len(ROWS))]
    return [row.reshape(TILE, 3, TILE + GAP, 3)[:, :, :TILE] for row in rows]


def test_the_truth_in_another_unit_and_world_looks_like_the_truth(scene):
    move = random_similarity(1, 1)
    moved = move_world(scene.world_to_camera[None].double(), move)[0].float()
    same = replace(scene, depth=scene.depth * float(move.scale), world_to_camera=moved)
    sheet = np.asarray(compare_views(scene, same, tile=TILE)).astype(int)
    image, true_depth, depth, true_points, points = panels(sheet)
    assert (image == scene.images.permute(2, 0, 3, 1).numpy()).all()
    known = (scene.depth > 0).permute(1, 0, 2).numpy()
    assert abs(true_depth - depth).max() <= 1 and abs(true_points - points)[known].max() <= 1
    assert (true_points[~known] == 128).all() and (true_depth[known].std(0) > 0).all()
    plain = np.asarray(compare_views(scene, scene, tile=TILE)).astype(int)
    assert abs(plain - sheet)[:16].max() == 0  # the title's errors: 0 in both


def test_worse_predictions_look_worse(scene):
    mirrored = replace(scene, depth=scene.depth.flip(-1), world_to_camera=scene.world_to_camera.flip(0))
    _, true_depth, depth, true_points, points = panels(np.asarray(compare_views(scene, mirrored, tile=TILE)))
    assert (true_depth != depth).any() and (true_points != points).any()


def test_what_is_not_finite_and_truth_without_depth_are_drawn_too(scene):
    nan = torch.full_like
    lost = replace(
        scene,
        depth=nan(scene.depth, torch.nan),
        intrinsics=nan(scene.intrinsics, torch.nan),
        world_to_camera=nan(scene.world_to_camera, torch.nan),
    )
    empty = replace(scene, depth=torch.zeros_like(scene.depth))
    sizes = {
        compare_views(*pair, tile=TILE).size
        for pair in ((scene, lost), (empty, scene), (empty, lost), (scene, replace(scene, depth=-scene.depth)))
    }
    assert len(sizes) == 1
