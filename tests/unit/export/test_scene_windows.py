"""Windows of many photos, and how two of them become one scene."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from own_scene_layouts import SIZE, shots
from own_scene_layouts import intrinsics as shot_intrinsics
from restrike.export.scene_windows import WindowView, join_window, place_view, windows
from restrike.geometry import axis_angle_to_matrix, invert_se3, make_se3, multiply

WHOLE = torch.tensor([0.0, 0, SIZE[1], SIZE[0]])


def views(rows: range) -> list[WindowView]:
    lens = torch.tensor(shot_intrinsics()).float()
    found = [shots(4)[row] for row in rows]
    return [
        WindowView(lens, torch.tensor(s.world_to_camera).float(), torch.tensor(s.depth), None, WHOLE) for s in found
    ]


def moved(view: WindowView) -> WindowView:
    """The same view in a world that is turned, shifted, and 2.5 times as large."""
    rotation = axis_angle_to_matrix(torch.tensor([0.3, -1.0, 0.5]))
    pose = invert_se3(view.world_to_camera)
    center = 2.5 * (rotation @ pose[:, 3]) + torch.tensor([3.0, -1, 2])
    pose = make_se3(multiply(rotation, pose[:, :3]), center)
    return view._replace(world_to_camera=invert_se3(pose), depth=2.5 * view.depth)


@pytest.mark.parametrize(("count", "size", "overlap"), [(1, 4, 2), (4, 4, 2), (5, 4, 2), (11, 4, 1), (9, 3, 0)])
def test_windows_hold_every_photo_and_share_some_with_the_one_before(count, size, overlap):
    found = windows(count, size, overlap)
    assert {row for window in found for row in window} == set(range(count))
    assert all(len(window) <= size for window in found)
    for before, after in zip(found, found[1:], strict=False):
        assert len(set(before) & set(after)) == overlap and len(after) > overlap


def test_windows_that_do_not_move_on_are_refused():
    with pytest.raises(ValueError, match="data.overlap: expected 0 … 3"):
        windows(10, 4, 4)


def test_a_window_in_another_world_is_brought_back_by_the_photos_it_shares():
    shared, new = views(range(1, 3)), views(range(3, 4))
    found = join_window([moved(view) for view in shared], shared)
    placed = place_view(moved(new[0]), found)
    torch.testing.assert_close(placed.world_to_camera, new[0].world_to_camera, atol=1e-4, rtol=0)
    torch.testing.assert_close(placed.depth, new[0].depth, atol=1e-4, rtol=0)


def test_a_third_of_wrong_depth_does_not_move_the_result():
    shared = views(range(1, 3))
    wrong = [moved(view) for view in shared]
    for view in wrong:
        view.depth[: SIZE[0] // 3] *= 3
    found = join_window(wrong, shared)
    placed = place_view(wrong[0], found)
    assert (placed.world_to_camera - shared[0].world_to_camera).abs().max() < 1e-3


def test_windows_that_saw_other_crops_of_the_shared_photo_are_joined_by_its_pixels():
    shared = views(range(1, 2))
    middle = torch.tensor([24.0, 12, 72, 60])
    cropped = moved(shared[0])._replace(depth=2.5 * shared[0].depth[12:60, 24:72], crop_box=middle)
    found = join_window([cropped], shared)
    assert float(found.scale) == pytest.approx(1 / 2.5, abs=1e-4)
    angle = math.acos(float((np.trace(found.rotation.numpy()) - 1) / 2))
    assert angle == pytest.approx(float(torch.tensor([0.3, -1.0, 0.5]).norm()), abs=1e-3)


def test_confidence_says_which_points_count():
    shared = views(range(1, 2))
    sure = torch.ones(SIZE)
    sure[:, : 2 * SIZE[1] // 3] = 0.1  # two thirds are wrong, and say so
    wrong = moved(shared[0])._replace(confidence=sure)
    wrong.depth[:, : 2 * SIZE[1] // 3] *= 2
    found = join_window([wrong], shared)
    assert float(found.scale) == pytest.approx(1 / 2.5, abs=1e-3)


def test_windows_without_a_common_point_say_what_to_change():
    shared = views(range(1, 2))
    with pytest.raises(ValueError, match=r"data\.overlap"):
        join_window([shared[0]._replace(depth=torch.zeros(SIZE))], shared)
