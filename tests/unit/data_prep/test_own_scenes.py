"""Photos, COLMAP models and transforms.json: the same cameras and the same depth, whichever layout they come in."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from own_scene_layouts import (
    SIZE,
    distorted,
    intrinsics,
    save_picture,
    shots,
    write_colmap,
    write_photos,
    write_transforms,
)
from restrike.data.decode import DecodeError
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.own_frames import read_pixels
from restrike.data_prep.own_scenes import ReadOptions, find_scenes, read_sample, read_scene, read_views
from restrike.viz.scene import SceneViews, depth_agreement

AGREES = 0.02  # of depth: pixels of these small pictures are coarse
BARREL = (-0.3, 0.05, 0.004, -0.003)


def agreement(views: list) -> float:
    """The worst `depth_agreement` of any view."""
    scene = SceneViews(
        "scene",
        [str(view.number) for view in views],
        torch.from_numpy(np.stack([view.image for view in views])).permute(0, 3, 1, 2),
        torch.from_numpy(np.stack([view.depth for view in views])),
        torch.from_numpy(np.stack([view.intrinsics for view in views])),
        torch.from_numpy(np.stack([view.world_to_camera for view in views])),
    )
    return max(depth_agreement(scene, view) for view in range(len(views)))


def check_cameras_are_the_shots(scene) -> None:
    for frame, shot in zip(scene.frames, shots(), strict=True):
        np.testing.assert_allclose(frame.world_to_camera, shot.world_to_camera, atol=1e-6)
        np.testing.assert_allclose(frame.lens.intrinsics, intrinsics(), atol=1e-4)
        assert frame.lens.size == SIZE


@pytest.mark.parametrize("is_per_frame", [False, True])
@pytest.mark.parametrize("depth", ["png", "npy"])
def test_transforms_json_gives_its_cameras_and_depth(tmp_path: Path, is_per_frame: bool, depth: str) -> None:
    scene = read_scene(write_transforms(tmp_path / "desk", shots(), is_per_frame, depth))
    assert (scene.name, scene.layout, scene.has_cameras) == ("desk", "transforms", True)
    check_cameras_are_the_shots(scene)
    views = read_views(scene)
    for view, shot in zip(views, shots(), strict=True):
        np.testing.assert_allclose(view.depth, shot.depth, atol=6e-4)
        np.testing.assert_array_equal(view.image, shot.image)
        np.testing.assert_array_equal(view.foreground > 0, shot.is_object)
    assert agreement(views) < AGREES


@pytest.mark.parametrize("is_binary", [False, True])
def test_a_colmap_model_gives_its_cameras_and_sparse_depth(tmp_path: Path, is_binary: bool) -> None:
    scene = read_scene(write_colmap(tmp_path / "desk", shots(), is_binary))
    assert scene.layout == "colmap"
    check_cameras_are_the_shots(scene)
    for view, shot in zip(read_views(scene), shots(), strict=True):
        known = view.depth > 0
        assert known[::7, ::7].all() and known.sum() == known[::7, ::7].size, "each picture's own points only"
        np.testing.assert_allclose(view.depth[known], shot.depth[known], rtol=1e-4)
        np.testing.assert_array_equal(view.depth_mask, known)


def test_dense_depth_of_colmap_is_taken_before_sparse_points(tmp_path: Path) -> None:
    folder = write_colmap(tmp_path / "desk", shots())
    (folder / "stereo" / "depth_maps").mkdir(parents=True)
    for number, shot in enumerate(shots()):
        dense = f"{SIZE[1]}&{SIZE[0]}&1&".encode() + shot.depth.astype("<f4").tobytes()
        (folder / "stereo" / "depth_maps" / f"{number:03d}.jpg.geometric.bin").write_bytes(dense)
    views = read_views(read_scene(folder))
    np.testing.assert_array_equal(views[2].depth, shots()[2].depth)
    assert agreement(views) < AGREES


@pytest.mark.parametrize(
    ("model", "params", "lens"),
    [
        ("SIMPLE_PINHOLE", (100.0, 50.5, 35.0), None),
        ("SIMPLE_RADIAL", (100.0, 50.5, 35.0, -0.3), (-0.3, 0.0, 0.0, 0.0)),
        ("RADIAL", (100.0, 50.5, 35.0, -0.3, 0.05), (-0.3, 0.05, 0.0, 0.0)),
        ("OPENCV", (100.0, 100.0, 50.5, 35.0, *BARREL), BARREL),
    ],
)
def test_lenses_are_undistorted(tmp_path: Path, model: str, params: tuple, lens: tuple | None) -> None:
    taken = distorted(lens) if lens else shots()
    scene = read_scene(write_colmap(tmp_path / "desk", shots(), True, model, params))
    for number, shot in enumerate(taken):  # sparse points are the world's: only the pictures bend
        save_picture(tmp_path / "desk" / "images" / f"{number:03d}.jpg", shot.image)
    assert scene.frames[0].lens.distortion == (lens or (0.0, 0.0, 0.0, 0.0))
    view = read_views(scene, [3])[0]
    assert (view.depth > 0).sum() > 60

    def difference(shift: float) -> float:
        """From what a pinhole camera with the new intrinsics, `shift` pixels off, would have seen."""
        return np.abs(view.image.astype(float) - pinhole(view.intrinsics, "image", shift)).mean()

    assert difference(0) < 3.5 and difference(0) < 0.6 * min(difference(0.5), difference(-0.5))
    if lens:
        assert np.abs(taken[3].image.astype(float) - pinhole(intrinsics(), "image")).mean() > 2 * difference(0)


def pinhole(camera: np.ndarray, kind: str, shift: float = 0.0) -> np.ndarray:
    """What a camera without distortion sees at the place of `shots()[3]`."""
    wide = getattr(shots(size=(SIZE[0] + 48, SIZE[1] + 64))[3], kind)
    u, v = np.meshgrid(np.arange(SIZE[1]) + 0.5, np.arange(SIZE[0]) + 0.5)
    x, y = (u - camera[0, 2]) / camera[0, 0], (v - camera[1, 2]) / camera[1, 1]
    at = [(100 * rays + center - 0.5 + shift).astype(np.float32) for rays, center in ((x, 82.5), (y, 59.0))]
    return cv2.remap(wide, *at, cv2.INTER_LINEAR if kind == "image" else cv2.INTER_NEAREST)


def test_distorted_depth_maps_are_straightened_with_their_pictures(tmp_path: Path) -> None:
    folder = write_transforms(tmp_path / "desk", distorted(BARREL), is_per_frame=True)
    edit_transforms(folder, **dict(zip(("k1", "k2", "p1", "p2"), BARREL, strict=True)))
    view = read_views(read_scene(folder))[3]
    expected, unbent = pinhole(view.intrinsics, "depth"), pinhole(intrinsics(), "depth")
    wrong = (np.abs(view.depth - expected) > 0.02 * expected).mean()
    wrong_if_bent = (np.abs(distorted(BARREL)[3].depth - unbent) > 0.02 * unbent).mean()
    assert wrong < 0.07 and wrong < 0.5 * wrong_if_bent, "edges and the steep floor apart"
    assert agreement(read_views(read_scene(folder))) < AGREES


def test_photos_are_the_right_way_up_and_take_their_focal_length_from_exif(tmp_path: Path) -> None:
    folder = tmp_path / "trip"
    image = shots()[0].image
    save_picture(folder / "a.jpg", image, focal_35mm=28)
    save_picture(folder / "b.jpg", np.rot90(image), orientation=6)
    save_picture(folder / "c.jpg", image)
    scene = read_scene(folder)
    assert scene.layout == "photos" and not scene.has_cameras
    assert [frame.lens.size for frame in scene.frames] == [SIZE] * 3
    assert scene.frames[0].lens.intrinsics[0, 0] == pytest.approx(28 / np.hypot(36, 24) * np.hypot(*SIZE))
    assert scene.frames[2].lens.intrinsics[0, 0] == pytest.approx(1.2 * 96)
    views = read_views(scene)
    assert np.abs(views[1].image.astype(int) - views[2].image.astype(int)).mean() < 4, "turned upright"
    assert np.isnan(views[0].world_to_camera).all() and not views[0].depth.any()


def test_pictures_with_cameras_are_turned_only_if_their_camera_was(tmp_path: Path) -> None:
    folder = write_colmap(tmp_path / "desk", shots())
    image = shots()[1].image
    save_picture(folder / "images" / "001.jpg", image, orientation=6)  # COLMAP saw the pixels as they are stored
    save_picture(folder / "images" / "002.jpg", np.rot90(image), orientation=6)  # the camera says landscape
    stored, turned = read_views(read_scene(folder), [1, 2])
    assert np.abs(stored.image.astype(int) - image.astype(int)).mean() < 4
    assert np.abs(turned.image.astype(int) - image.astype(int)).mean() < 4


def test_smaller_pictures_scale_their_cameras(tmp_path: Path) -> None:
    folder = write_colmap(tmp_path / "desk", shots())
    for number, shot in enumerate(shots()):
        save_picture(folder / "images_2" / f"{number:03d}.jpg", shot.image[::2, ::2])
    view = read_views(read_scene(folder, ReadOptions(images="images_2")), [0])[0]
    assert view.image.shape == (36, 48, 3) and view.depth.shape == (36, 48)
    np.testing.assert_allclose(view.intrinsics, np.diag([0.5, 0.5, 1]) @ intrinsics())


def test_a_folder_is_one_typed_sample(tmp_path: Path) -> None:
    folder = write_transforms(tmp_path / "desk", shots())
    sample = read_sample(folder, (56, 70), rows=[0, 2, 4])
    assert sample.images.shape == (3, 3, 56, 70) and sample.images.dtype == torch.uint8
    assert sample.frame_numbers.tolist() == [0, 2, 4] and sample.valid_depth.float().mean() > 0.9
    scene = SceneViews("desk", ["0", "2", "4"], sample.images, sample.depth, sample.intrinsics, sample.world_to_camera)
    assert depth_agreement(scene, 0) < AGREES
    photos = read_sample(write_photos(tmp_path / "trip", shots()), (56, 70))
    assert photos.images.shape[0] == 6 and photos.world_to_camera.isnan().all() and not photos.valid_depth.any()


def test_scale_moves_cameras_and_depth_alike(tmp_path: Path) -> None:
    folder = write_transforms(tmp_path / "desk", shots())
    plain, scaled = (read_views(read_scene(folder), [1], ReadOptions(scale=s))[0] for s in (1.0, 5.0))
    np.testing.assert_allclose(scaled.depth, 5 * plain.depth, rtol=1e-6)
    np.testing.assert_allclose(scaled.world_to_camera[:, 3], 5 * plain.world_to_camera[:, 3], rtol=1e-6)
    np.testing.assert_allclose(scaled.world_to_camera[:, :3], plain.world_to_camera[:, :3])


def test_parts_of_a_layout_are_kept_and_others_are_drawn(tmp_path: Path) -> None:
    folder = write_transforms(tmp_path / "desk", shots())
    parts = [frame.part for frame in read_scene(folder, ReadOptions(val_every=3)).frames]
    assert parts == ["val", "train", "train", "val", "train", "train"]
    assert {frame.part for frame in read_scene(folder, ReadOptions(val_scenes=("desk",))).frames} == {"val"}
    content = json.loads((folder / "transforms.json").read_text())
    frames = content.pop("frames")
    (folder / "transforms.json").unlink()
    for part, some in (("train", frames[:4]), ("test", frames[4:])):
        (folder / f"transforms_{part}.json").write_text(json.dumps(content | {"frames": some}))
    assert [frame.part for frame in read_scene(folder).frames] == ["train"] * 4 + ["test"] * 2


def test_many_scenes_are_found_whatever_their_layout(tmp_path: Path) -> None:
    write_transforms(tmp_path / "b", shots())
    write_colmap(tmp_path / "a", shots())
    write_photos(tmp_path / "c", shots()[:1])
    (tmp_path / "notes").mkdir()
    assert [path.name for path in find_scenes(tmp_path)] == ["a", "b", "c"]
    assert [read_scene(path).layout for path in find_scenes(tmp_path)] == ["colmap", "transforms", "photos"]
    with pytest.raises(PrepareError, match="holds no scene .it holds nothing."):
        find_scenes(tmp_path / "notes")


def edit_transforms(folder: Path, **values) -> None:
    content = json.loads((folder / "transforms.json").read_text())
    for key, value in values.items():
        if key in ("file_path", "transform_matrix", "depth_file_path"):
            content["frames"][1][key] = value
        else:
            content[key] = value
    (folder / "transforms.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"frames": "none"}, r"transforms.json: expected \{\"frames\""),
        ({"file_path": None}, "frame 1 has no file_path; drop"),
        ({"transform_matrix": [[1, 2], [3, 4]]}, r"frame 1 \('images/frame_00001.png'\): transform_matrix is no 4 x 4"),
        ({"transform_matrix": (2 * np.eye(4)).tolist()}, "R that is no rotation.*move the scale into the positions"),
        ({"camera_model": "OPENCV_FISHEYE"}, "OPENCV_FISHEYE is no pinhole; undistort the pictures first"),
        ({"k3": 0.1}, "distortion beyond k1, k2, p1, p2; undistort"),
        ({"camera_angle_x": None}, "neither fl_x nor camera_angle_x; add one of them"),
        ({"camera_angle_x": "wide"}, "an intrinsic value is no number"),
        ({"file_path": "./images/frame_00000.png"}, "'images/frame_00000.png' comes twice"),
    ],
)
def test_a_bad_transforms_json_is_named(tmp_path: Path, values: dict, expected: str) -> None:
    folder = write_transforms(tmp_path / "desk", shots())
    edit_transforms(folder, **values)
    with pytest.raises(PrepareError, match=expected):
        read_scene(folder)


@pytest.mark.parametrize(
    ("path", "data", "expected"),
    [
        ("images/frame_00001.png", b"no picture", "images/frame_00001.png: of no known image format"),
        ("depth/00001.png", b"\x89PNG half", "depth/00001.png: damaged or truncated PNG"),
        ("depth/00001.png", None, "depth/00001.png: No such file"),
        ("masks/00001.png", b"", "masks/00001.png: the file is empty"),
    ],
)
def test_a_bad_file_of_a_frame_is_named(tmp_path: Path, path: str, data: bytes | None, expected: str) -> None:
    folder = write_transforms(tmp_path / "desk", shots())
    (folder / path).unlink() if data is None else (folder / path).write_bytes(data)
    with pytest.raises(DecodeError, match=expected):
        read_views(read_scene(folder), [1])


def test_paths_that_lead_out_of_a_scene_are_refused(tmp_path: Path) -> None:
    folder = write_transforms(tmp_path / "desk", shots(), is_per_frame=True)
    edit_transforms(folder, file_path="../other/1.png")
    with pytest.raises(DecodeError, match="leads out of the data set; refused"):
        read_views(read_scene(folder))


def test_depth_in_a_wrong_unit_and_pictures_of_another_camera_are_refused(tmp_path: Path) -> None:
    folder = write_transforms(tmp_path / "desk", shots())
    with pytest.raises(DecodeError, match="median depth .* give --scale .* or --depth-unit"):
        read_views(read_scene(folder, ReadOptions(depth_unit=100.0)), [0])
    folder = write_colmap(tmp_path / "wall", shots())
    save_picture(folder / "images" / "003.jpg", shots()[0].image[:, :50])
    with pytest.raises(DecodeError, match=r"003.jpg: \[72, 50\] pixels, its camera has \[72, 96\]; give the pictures"):
        scene = read_scene(folder)
        read_pixels(scene, scene.frames[3])
