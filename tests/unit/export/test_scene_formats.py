"""A scene with known geometry through every format and back, by other tools' readers where they are installed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from own_scene_layouts import SIZE, shots
from own_scene_layouts import intrinsics as shot_intrinsics
from restrike.data.predicted_views import cell_centers
from restrike.data_prep.colmap import read_colmap
from restrike.data_prep.transforms_json import read_transforms
from restrike.export.scene import PhotoCameras, ScenePoints, join_points, lift_points, surest_points
from restrike.export.scene_colmap import write_colmap
from restrike.export.scene_glb import write_glb
from restrike.export.scene_npz import write_cameras_npz, write_view_npz
from restrike.export.scene_ply import write_ply
from restrike.export.scene_transforms import write_transforms
from restrike.geometry import project_points

NAMES = ["a.jpg", "sub/b.jpg", "sub/c.png"]
EXACT = 1e-4  # float32 in scenes of a few units
PIXEL = 0.01


@pytest.fixture(scope="module")
def cameras() -> PhotoCameras:
    poses = torch.tensor(np.stack([shot.world_to_camera for shot in shots(3)])).float()
    lens = torch.tensor(shot_intrinsics()).float().expand(3, 3, 3)
    return PhotoCameras(NAMES, torch.tensor([SIZE] * 3), lens, poses)


@pytest.fixture(scope="module")
def points(cameras) -> ScenePoints:
    pixels = cell_centers(torch.tensor([0.0, 0, SIZE[1], SIZE[0]]), SIZE)
    parts = []
    for view, shot in enumerate(shots(3)):
        colors = torch.tensor(shot.image).permute(2, 0, 1)
        confidence = torch.arange(float(SIZE[0] * SIZE[1])).view(SIZE) + 1
        pose = cameras.intrinsics[view], cameras.world_to_camera[view]
        parts.append(lift_points(torch.tensor(shot.depth), pixels, colors, pose, SIZE, view, confidence, 500))
    return join_points(parts)


def test_points_lie_in_their_pixels_and_have_their_colors(cameras, points):
    assert len(points.points) == 1500 and points.confidence is not None
    for view, shot in enumerate(shots(3)):
        own = points.select(points.views == view)
        pixels, depth = project_points(own.points, cameras.intrinsics[view], cameras.world_to_camera[view])
        assert (pixels - own.pixels).abs().max() < PIXEL and (depth > 0).all()
        column, row = own.pixels.long().unbind(-1)
        assert torch.equal(torch.tensor(shot.image)[row, column], own.colors)


def test_cells_outside_the_photo_and_unknown_depth_give_no_points(cameras):
    pixels = cell_centers(torch.tensor([-48.0, 0, 96, 72]), (4, 6))  # a third of it is padding
    depth = torch.ones(4, 6)
    depth[0, 5], depth[1, 5], depth[2, 5] = 0, torch.nan, -1
    pose = cameras.intrinsics[0], cameras.world_to_camera[0]
    found = lift_points(depth, pixels, torch.zeros(3, 4, 6, dtype=torch.uint8), pose, SIZE)
    assert len(found.points) == 4 * 4 - 3 and (found.pixels >= 0).all() and found.confidence is None


def test_the_least_confident_points_are_left_out(points):
    sure = surest_points(points, 0.25)
    assert len(sure.points) == 1125
    assert sure.confidence.min() >= points.confidence.sort().values[370]
    assert surest_points(points._replace(confidence=None), 0.25).points is points.points


@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_our_own_reader_gets_cameras_and_points_back_from_colmap_files(cameras, points, tmp_path, kind):
    place = write_colmap(tmp_path / "sparse" / "0", cameras, points)
    for file in place.glob("*.txt" if kind == "bin" else "*.bin"):
        file.unlink()
    (tmp_path / "images").mkdir()
    scene = read_colmap(tmp_path, "scene")
    assert [frame.path for frame in scene.frames] == [f"images/{name}" for name in NAMES]
    for view, frame in enumerate(scene.frames):
        np.testing.assert_allclose(frame.world_to_camera, cameras.world_to_camera[view], atol=1e-5)
        np.testing.assert_allclose(frame.lens.intrinsics, cameras.intrinsics[view], atol=EXACT)
        assert frame.lens.size == SIZE
        np.testing.assert_allclose(frame.depth, points.points[points.views == view], atol=EXACT)


@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_pycolmap_reads_the_model_and_its_points_fall_on_their_observations(cameras, points, tmp_path, kind):
    pycolmap = pytest.importorskip("pycolmap", reason="needs pycolmap: pip install pycolmap")
    place = write_colmap(tmp_path / "model", cameras, points)
    for file in place.glob("*.txt" if kind == "bin" else "*.bin"):
        file.unlink()
    model = pycolmap.Reconstruction(str(place))
    assert len(model.images) == 3 and len(model.points3D) == 1500
    for image in model.images.values():
        view = NAMES.index(image.name)
        assert (model.cameras[image.camera_id].height, model.cameras[image.camera_id].width) == SIZE
        seen = [point for point in image.points2D if point.has_point3D()]
        assert len(seen) == 500
        for point in seen[::50]:
            projected = image.project_point(model.points3D[point.point3D_id].xyz)
            assert np.abs(projected - point.xy).max() < PIXEL
        expected = cameras.world_to_camera[view].numpy()
        np.testing.assert_allclose(image.cam_from_world().matrix(), expected, atol=1e-5)


def test_names_that_text_files_cannot_hold_are_refused(cameras, points, tmp_path):
    spaced = PhotoCameras(["a b.jpg", *NAMES[1:]], cameras.sizes, cameras.intrinsics, cameras.world_to_camera)
    with pytest.raises(ValueError, match="'a b.jpg'"):
        write_colmap(tmp_path, spaced, points)


def test_transforms_json_comes_back_with_the_same_cameras(cameras, tmp_path):
    write_transforms(tmp_path / "transforms.json", cameras, points="points.ply")
    assert json.loads((tmp_path / "transforms.json").read_text())["ply_file_path"] == "points.ply"
    scene = read_transforms(tmp_path, "scene")
    assert [frame.path for frame in scene.frames] == [f"images/{name}" for name in NAMES]
    for view, frame in enumerate(scene.frames):
        np.testing.assert_allclose(frame.world_to_camera, cameras.world_to_camera[view], atol=1e-5)
        np.testing.assert_allclose(frame.lens.intrinsics, cameras.intrinsics[view], atol=EXACT)
        assert frame.lens.size == SIZE


def test_a_ply_file_holds_points_colors_and_confidence(points, tmp_path):
    content = write_ply(tmp_path / "points.ply", points).read_bytes()
    header, _, body = content.partition(b"end_header\n")
    assert b"element vertex 1500\n" in header and len(body) == 1500 * (3 * 4 + 3 + 4)
    x, y, z, red, green, blue, confidence = struct.unpack_from("<3f3Bf", body, 19 * 7)
    assert [x, y, z] == points.points[7].tolist() and [red, green, blue] == points.colors[7].tolist()
    assert confidence == points.confidence[7]


def test_trimesh_reads_the_ply_file(points, tmp_path):
    trimesh = pytest.importorskip("trimesh", reason="needs trimesh: pip install trimesh")
    cloud = trimesh.load(write_ply(tmp_path / "points.ply", points._replace(confidence=None)))
    np.testing.assert_allclose(cloud.vertices, points.points, atol=1e-6)
    assert np.array_equal(np.asarray(cloud.colors)[:, :3], points.colors)


def glb_json(path: Path) -> dict:
    data = path.read_bytes()
    magic, version, length, size, kind = struct.unpack_from("<4sIII4s", data)
    assert (magic, version, length, kind) == (b"glTF", 2, len(data), b"JSON")
    return json.loads(data[20 : 20 + size])


def test_trimesh_reads_the_glb_file_turned_to_its_axes(cameras, points, tmp_path):
    trimesh = pytest.importorskip("trimesh", reason="needs trimesh: pip install trimesh")
    scene = trimesh.load(write_glb(tmp_path / "scene.glb", cameras, points), force="scene")
    clouds = [shape for shape in scene.geometry.values() if isinstance(shape, trimesh.PointCloud)]
    assert len(clouds) == 1
    expected = points.points.numpy() * [1, -1, -1]
    np.testing.assert_allclose(clouds[0].vertices, expected, atol=1e-6)


def test_glb_cameras_see_the_points_where_the_photos_do(cameras, points, tmp_path):
    content = glb_json(write_glb(tmp_path / "scene.glb", cameras, points))
    nodes = [node for node in content["nodes"] if "camera" in node]
    assert [node["name"] for node in nodes] == NAMES
    for view, node in enumerate(nodes):
        to_camera = np.linalg.inv(np.array(node["matrix"]).reshape(4, 4).T)
        own = points.select(points.views == view)
        world = own.points.numpy() * [1, -1, -1]
        x, y, z = (world @ to_camera[:3, :3].T + to_camera[:3, 3]).T
        lens = content["cameras"][node["camera"]]["perspective"]
        focal = SIZE[0] / 2 / np.tan(lens["yfov"] / 2)
        assert (z < 0).all()  # a glTF camera looks along -z, y up
        np.testing.assert_allclose(focal * x / -z + 50.5, own.pixels[:, 0], atol=PIXEL)
        np.testing.assert_allclose(35.0 - focal * y / -z, own.pixels[:, 1], atol=PIXEL)
        assert lens["aspectRatio"] == pytest.approx(SIZE[1] / SIZE[0])


def test_glb_colors_are_linear_and_every_accessor_is_aligned(cameras, points, tmp_path):
    path = write_glb(tmp_path / "scene.glb", cameras, points)
    content = glb_json(path)
    assert all(view["byteOffset"] % 4 == 0 for view in content["bufferViews"])
    start = path.stat().st_size - content["buffers"][0]["byteLength"]
    view = content["bufferViews"][content["accessors"][1]["bufferView"]]
    raw = path.read_bytes()[start + view["byteOffset"] :][: view["byteLength"]]
    linear = np.frombuffer(raw, "<u2").reshape(-1, 4)[:, :3] / 65535
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.array_equal(np.round(255 * srgb).astype(np.uint8), points.colors)


def test_a_scene_without_points_still_has_its_cameras(cameras, points, tmp_path):
    none = points.select(torch.zeros(len(points.points), dtype=torch.bool))
    assert len(glb_json(write_glb(tmp_path / "scene.glb", cameras, none))["cameras"]) == 3
    write_colmap(tmp_path / "model", cameras, none)
    assert b"element vertex 0" in write_ply(tmp_path / "points.ply", none).read_bytes()


def test_npz_files_hold_cameras_and_maps(cameras, tmp_path):
    write_cameras_npz(tmp_path / "cameras.npz", cameras, ["A.HEIC", "b", "c"], ["views/a.jpg.npz", "", ""])
    with np.load(tmp_path / "cameras.npz") as found:
        assert found["names"].tolist() == NAMES and found["sources"][0] == "A.HEIC"
        np.testing.assert_array_equal(found["world_to_camera"], cameras.world_to_camera)
    depth = torch.rand(3, 4)
    write_view_npz(tmp_path / "views" / "a.jpg.npz", depth, None, torch.tensor([0.0, 0, 4, 3]))
    with np.load(tmp_path / "views" / "a.jpg.npz") as found:
        np.testing.assert_array_equal(found["depth"], depth)
        assert "confidence" not in found


def test_arrays_that_are_none_of_cameras_are_refused(cameras):
    with pytest.raises(ValueError, match="each of 2 photos"):
        PhotoCameras(NAMES[:2], cameras.sizes, cameras.intrinsics, cameras.world_to_camera)
    with pytest.raises(ValueError, match="predicted cameras"):
        PhotoCameras(NAMES, cameras.sizes, -cameras.intrinsics, cameras.world_to_camera)
