"""Scenes as pictures: right cameras and depth agree, each wrong convention shows, unknown depth is grey."""

import dataclasses

import numpy as np
import pytest
import torch

from own_scene_layouts import toy_views
from restrike.geometry import camera_centers, invert_se3, resize_intrinsics
from restrike.viz.scene import ColoredPoints, SceneViews, depth_agreement, render_points, seen_by_others, view_points
from restrike.viz.scene_views import colorize_depth, draw_cameras, draw_views, frustum, upright

AGREES = 0.02
WRONG = 0.04  # at least, whichever convention is wrong


@pytest.fixture(scope="module")
def scene() -> SceneViews:
    return toy_views("train 0 desk")


def worst(scene: SceneViews) -> float:
    return max(depth_agreement(scene, view) for view in range(len(scene)))


def best(scene: SceneViews) -> float:
    values = [depth_agreement(scene, view) for view in range(len(scene))]
    return min(value if value == value else 1.0 for value in values)


def subset(scene: SceneViews, views: list[int]) -> SceneViews:
    names = ("images", "depth", "intrinsics", "world_to_camera", "foreground")
    parts = {name: getattr(scene, name)[views] for name in names}
    return dataclasses.replace(scene, labels=[scene.labels[view] for view in views], **parts)


def test_right_conventions_agree(scene):
    assert worst(scene) < AGREES


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: {"world_to_camera": invert_se3(s.world_to_camera)},
        lambda s: {"world_to_camera": s.world_to_camera * torch.tensor([-1.0, -1.0, 1.0])[:, None]},
        lambda s: {"world_to_camera": s.world_to_camera * torch.tensor([1.0, -1.0, -1.0])[:, None]},
        lambda s: {"depth": 3 * s.depth},
        lambda s: {"depth": 1 / s.depth},
    ],
    ids=["inverse pose", "x left, y up", "y up, z backward", "depth in another unit", "disparity for depth"],
)
def test_each_wrong_convention_shows(scene, wrong):
    apart = subset(scene, [0, 5])  # depth in another unit moves points along rays: neighbours hardly see it
    assert worst(apart) < AGREES
    assert best(dataclasses.replace(apart, **wrong(apart))) > WRONG


def test_points_of_the_others_are_the_own_picture(scene):
    seen = seen_by_others(scene, 2)
    known = seen.depth > 0
    assert known.float().mean() > 0.8
    own = scene.images[2].permute(1, 2, 0).float()
    difference = (seen.colors.float() - own).abs().mean(-1)[known].mean()
    another = (own - scene.images[5].permute(1, 2, 0).float()).abs().mean()
    assert difference < 15 and difference < 0.6 * another, "squares of 3 pixels blur"
    assert 0.95 < float((seen.depth / scene.depth[2])[known].median()) < 1.01, "the nearest point of a square counts"


def test_a_coarse_depth_grid_covers_the_same_picture(scene):
    coarse = dataclasses.replace(scene, depth=scene.depth[:, 1::4, 1::4], foreground=None)
    points = view_points(coarse, 0)
    assert len(points.points) == 18 * 24
    np.testing.assert_allclose(points.points.median(0).values, view_points(scene, 0).points.median(0).values, atol=0.1)
    assert worst(coarse) < 3 * AGREES


def test_points_are_thinned_and_unknown_ones_left_out(scene):
    depth = scene.depth.clone()
    depth[:, :36] = 0
    depth[:, 40] = torch.inf
    half = dataclasses.replace(scene, depth=depth, confidence=depth)
    points = view_points(half, 1)
    assert len(points.points) == 35 * 96 and points.confidence is not None
    assert len(view_points(half, 1, 100).points) == len(view_points(half, 1, 100).confidence) == 100


def test_the_nearest_point_hides_the_others():
    points = torch.tensor([[0.0, 0, 2], [0, 0, 1], [0, 0, -1], [0.2, 0, 3]])
    colors = torch.tensor([[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]], dtype=torch.uint8)
    camera = torch.tensor([[10.0, 0, 4.5], [0, 10, 4.5], [0, 0, 1]]), torch.eye(4)[:3]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        drawn = render_points(ColoredPoints(points[order], colors[order]), *camera, (9, 9))
        assert drawn.colors[4, 4].tolist() == [2, 2, 2] and float(drawn.depth[4, 4]) == 1
        assert drawn.colors[4, 6].tolist() == [4, 4, 4] and int((drawn.depth > 0).sum()) == 12


def test_unknown_depth_is_grey_and_near_is_red():
    picture = colorize_depth(torch.tensor([[1.0, 2.0, 0.0, torch.inf]]), 1, 2)[0]
    assert picture[2].tolist() == picture[3].tolist() == [128, 128, 128]
    assert picture[0, 0] > picture[0, 2] and picture[1, 2] > picture[1, 0]
    assert (colorize_depth(torch.zeros(2, 2)) == 128).all()


def test_frusta_have_their_corners_on_the_picture(scene):
    corners = frustum(scene.intrinsics, scene.world_to_camera, (72, 96), 2.0)
    torch.testing.assert_close(corners[:, 0], camera_centers(scene.world_to_camera))
    from restrike.geometry import project_points

    pixels, depth = project_points(corners[:, 1:], scene.intrinsics, scene.world_to_camera)
    torch.testing.assert_close(depth, torch.full_like(depth, 2.0))
    expected = torch.tensor([[0.0, 0], [96, 0], [96, 72], [0, 72]]).expand_as(pixels)
    torch.testing.assert_close(pixels, expected, atol=1e-3, rtol=0)


def test_up_is_up(scene):
    turn = upright(scene.world_to_camera)
    torch.testing.assert_close(turn @ turn.T, torch.eye(3))
    assert torch.linalg.det(turn) > 0.99 and turn[2, 2] > 0.98, "the ray caster's world has z up"
    alone = upright(scene.world_to_camera[:1])
    torch.testing.assert_close(alone[2], -scene.world_to_camera[0, 1, :3])


def test_pictures_show_every_view(scene):
    sheet = np.asarray(draw_views(scene, tile=60))
    assert sheet.shape[1] == 5 * 66 + 6 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 500
    smaller = dataclasses.replace(
        scene, images=scene.images[..., ::2, ::2].contiguous(),
        intrinsics=resize_intrinsics(scene.intrinsics, 0.5, 0.5),
    )  # fmt: skip
    assert worst(smaller) < AGREES and draw_views(smaller, tile=60).size[0] == sheet.shape[1]
    cameras = np.asarray(draw_cameras(scene))
    assert cameras.shape == (550, 1100, 3) and cameras.std() > 10


def test_arrays_that_do_not_belong_together_are_refused(scene):
    with pytest.raises(ValueError, match=r"images: expected uint8 \[V, 3, H, W\], got torch.float32"):
        dataclasses.replace(scene, images=scene.images.float())
    with pytest.raises(ValueError, match=r"intrinsics: expected \[6, 3, 3\] for 6 views, got \[5, 3, 3\]"):
        dataclasses.replace(scene, intrinsics=scene.intrinsics[:5])
    with pytest.raises(ValueError, match=r"foreground: expected \[6, 36, 96\]"):
        dataclasses.replace(scene, depth=scene.depth[:, ::2])
    with pytest.raises(ValueError, match="labels: expected 6, got 1"):
        dataclasses.replace(scene, labels=["one"])
