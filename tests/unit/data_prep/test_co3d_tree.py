"""The reader of the genuine CO3D tree, on a tree of 22 frames with every trap of the real one."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from multiview_sets import TINY_TREE, edit_annotations
from restrike import geometry as g
from restrike.data.decode import DecodeError
from restrike.data_prep.co3d_annotations import Viewpoint
from restrike.data_prep.co3d_files import read_frame, read_inside, read_point_cloud
from restrike.data_prep.co3d_tree import Category, Sequence, cameras_of, list_categories, read_category
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.toy import ToyOptions, _Job, _scene, prepare_toy


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copytree(TINY_TREE, tmp_path / "co3d")
    return tmp_path / "co3d"


def only_problem(tree: Path) -> str:
    problems = [str(p) for s in read_category(tree, "apple").sequences.values() for p in s.problems]
    assert len(problems) == 1, problems
    return problems[0]


def agreement(root: Path, sequence: Sequence, first: int, second: int) -> float:
    """Median relative difference of the depth of one view, lifted and seen from another, to that one's own depth."""
    files = [read_frame(root, sequence.frames[k]) for k in (first, second)]
    cameras, intrinsics = torch.from_numpy(sequence.world_to_camera), torch.from_numpy(sequence.intrinsics)
    depth = torch.from_numpy(files[0].depth * files[0].depth_mask).double()
    world = g.unproject_depth(depth, intrinsics[first], g.invert_se3(cameras[first]))[depth > 0]
    seen = g.transform_points(cameras[second], world)
    pixels = g.project_points(seen, intrinsics[second])[0].floor().long()
    height, width = files[1].depth.shape
    inside = (pixels >= 0).all(-1) & (pixels[:, 0] < width) & (pixels[:, 1] < height) & (seen[:, 2] > 0)
    pixels, z = pixels[inside], seen[inside, 2]
    other = torch.from_numpy(files[1].depth * files[1].depth_mask).double()[pixels[:, 1], pixels[:, 0]]
    return float(((z - other).abs() / other)[other > 0].median())


def test_the_tiny_tree_reads_whole() -> None:
    assert list_categories(TINY_TREE) == ["apple", "ball"]
    category = read_category(TINY_TREE, "apple")
    assert {name: len(s.frames) for name, s in category.sequences.items()} == {
        "110_10000_20000": 6, "110_10001_20001": 4, "110_10002_20002": 6,
    }  # fmt: skip
    low = category.sequences["110_10001_20001"]
    assert low.annotation.viewpoint_quality_score == 0.31
    assert low.frames[1].frame_number == 1 and low.frames[1].image.path.endswith("frame000008.jpg")
    assert np.abs(low.intrinsics[:, :2, 2] - [64, 48]).max() > 0.5, "its principal point is off the centre"
    assert len(category.subsets["fewview_dev/test"]) == 6
    assert category.subsets["fewview_train/test"] == category.subsets["fewview_train/train"]


@pytest.mark.parametrize("name", ["apple", "ball"])
def test_depth_of_one_view_agrees_with_that_of_the_next(name: str) -> None:
    for sequence in read_category(TINY_TREE, name).sequences.values():
        assert agreement(TINY_TREE, sequence, 0, 1) < 0.01


def test_files_of_a_frame_come_decoded_with_unknown_depth_at_zero() -> None:
    frame = read_category(TINY_TREE, "apple").sequences["110_10000_20000"].frames[1]
    files = read_frame(TINY_TREE, frame)
    assert files.image.shape == (128, 96, 3) and files.depth.dtype == np.float32
    assert files.depth[0, 0] == 0, "the infinite pixel"
    assert (files.depth[files.depth_mask] > 0).all() and (files.depth == 0).any()
    assert files.foreground.max() == 255 and len(np.unique(files.foreground)) > 2


def test_point_cloud_lies_on_the_depth_maps() -> None:
    points, colors = read_point_cloud(TINY_TREE / "apple" / "110_10000_20000" / "pointcloud.ply")
    assert points.shape == (360, 3) and colors is not None and colors.dtype == np.uint8
    sequence = read_category(TINY_TREE, "apple").sequences["110_10000_20000"]
    seen = g.transform_points(torch.from_numpy(sequence.world_to_camera[0]), torch.from_numpy(points).double())
    depth = read_frame(TINY_TREE, sequence.frames[0]).depth
    assert 0.5 * depth[depth > 0].min() < float(seen[:, 2].median()) < 1.5 * depth.max()


@pytest.mark.parametrize("kind", ["ndc_isotropic", "ndc_norm_image_bounds"])
def test_cameras_round_trip_through_both_ndc_formats(kind: str) -> None:
    sequence = read_category(TINY_TREE, "apple").sequences["110_10001_20001"]
    cameras, intrinsics = torch.from_numpy(sequence.world_to_camera), torch.from_numpy(sequence.intrinsics)
    sizes = [frame.image.size for frame in sequence.frames]
    back = g.to_pytorch3d(cameras, intrinsics, torch.tensor(sizes), kind)  # type: ignore[arg-type]
    viewpoints = [Viewpoint(*(tuple(map(tuple, x.tolist())) if x.ndim > 1 else tuple(x.tolist()) for x in row), kind)
                  for row in zip(*back, strict=True)]  # fmt: skip
    again = cameras_of(viewpoints, sizes)
    np.testing.assert_allclose(again[0], sequence.world_to_camera, atol=1e-5)
    np.testing.assert_allclose(again[1], sequence.intrinsics, atol=1e-5)


def test_unknown_keys_are_ignored_and_redacted_frames_counted(tree: Path) -> None:
    def change(frames: list[dict]) -> None:
        frames[0]["new_key"] = {"x": 1}
        frames[1]["viewpoint"] = frames[1]["depth"] = frames[1]["mask"] = None

    edit_annotations(tree, change)
    sequence = read_category(tree, "apple").sequences["110_10000_20000"]
    assert len(sequence.frames) == 5 and sequence.redacted == 1 and not sequence.problems


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("R", [[1, 0, 0], [0, 1, 0], [0, 0, -1]], "no rotation"),
        ("R", [[2, 0, 0], [0, 1, 0], [0, 0, 1]], "no rotation"),
        ("T", [float("nan"), 0, 0], "not finite"),
        ("focal_length", [float("nan"), 1.0], "focal_length"),
        ("focal_length", [-2.0, 2.0], "focal_length"),
        ("principal_point", [float("inf"), 0], "principal_point"),
        ("intrinsics_format", "pixels", "intrinsics_format 'pixels'"),
    ],
)
def test_bad_camera_is_named_and_left_out(tree: Path, key: str, value: object, said: str) -> None:
    edit_annotations(tree, lambda frames: frames[2]["viewpoint"].update({key: value}))
    message = only_problem(tree)
    assert said in message and "sequence '110_10000_20000', frame 2" in message
    sequence = read_category(tree, "apple").sequences["110_10000_20000"]
    assert [frame.frame_number for frame in sequence.frames] == [0, 1, 3, 4, 5] and sequence.bad_cameras == 1


def test_duplicate_frame_is_named_and_the_first_kept(tree: Path) -> None:
    edit_annotations(tree, lambda frames: frames.append(frames[3]))
    assert "frame 3: apple/frame_annotations.jgz: this frame_number comes twice" in only_problem(tree)


def test_frame_of_an_unknown_sequence_is_an_orphan(tree: Path) -> None:
    edit_annotations(tree, lambda frames: frames[0].update(sequence_name="lost"))
    category: Category = read_category(tree, "apple")
    assert [problem.sequence for problem in category.orphans] == ["lost"]


def test_damaged_annotations_are_named_with_the_mend(tree: Path) -> None:
    path = tree / "apple" / "frame_annotations.jgz"
    whole = path.read_bytes()
    for data in (whole[:-200], b"no gzip", gzip.compress(b"{"), gzip.compress(b'[{"frame_number": 1}]')):
        path.write_bytes(data)
        with pytest.raises(PrepareError, match="frame_annotations.jgz.*fetch this file again"):
            read_category(tree, "apple")
    path.unlink()
    with pytest.raises(PrepareError, match="is missing"):
        read_category(tree, "apple")


@pytest.mark.parametrize("kind", ["image", "depth", "mask"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_file_of_a_frame_is_named(tree: Path, kind: str, damage: str) -> None:
    frame = read_category(tree, "apple").sequences["110_10000_20000"].frames[0]
    file = getattr(frame, kind)
    path = tree / file.path
    data = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(data[: len(data) // 2 if damage == "truncated" else 0])
    with pytest.raises(DecodeError, match=file.path.replace(".", r"\.")):
        read_frame(tree, frame)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../b"])
def test_paths_that_leave_the_tree_are_refused(name: str) -> None:
    with pytest.raises(DecodeError, match="leads out"):
        read_inside(TINY_TREE, name)


def test_toy_tree_is_read_by_the_same_reader_and_its_views_agree(tmp_path: Path) -> None:
    options = ToyOptions(categories=("apple", "bottle", "cup"), sequences=2, frames=8, size=64)
    assert prepare_toy(tmp_path, options) == 48
    for name in list_categories(tmp_path):
        category = read_category(tmp_path, name)
        for sequence in category.sequences.values():
            assert not sequence.problems and len(sequence.frames) == 8
            assert agreement(tmp_path, sequence, 0, 1) < 0.01
        held_out = {sequence for sequence, _ in category.subsets["fewview_dev/test"]}
        assert len(held_out) == 1 and not held_out & {s for s, _ in category.subsets["fewview_dev/train"]}


def test_toy_tree_is_the_same_with_any_number_of_workers_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    options = {"categories": ("apple", "ball"), "sequences": 1, "frames": 2, "size": 32}
    prepare_toy(tmp_path / "one", ToyOptions(**options))
    prepare_toy(tmp_path / "two", ToyOptions(**options))
    lost = next((tmp_path / "two" / ".prepare").glob("*.json"))
    lost.unlink()
    next((tmp_path / "two" / lost.name.split("-")[0]).glob("*/images/*.jpg")).write_bytes(b"half")
    prepare_toy(tmp_path / "two", ToyOptions(**options, workers=2))
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    different = [p for p in files if (tmp_path / "one" / p).read_bytes() != (tmp_path / "two" / p).read_bytes()]
    assert len(files) > 16 and not different


def test_toy_sequences_of_a_category_may_share_a_room_and_nothing_else(tmp_path: Path) -> None:
    options = ToyOptions(categories=("apple", "cup"), sequences=2, frames=4, size=32, rooms="category")
    prepare_toy(tmp_path, options)
    scenes = {}
    for category, name in enumerate(options.categories):
        sequences = list(read_category(tmp_path, name).sequences.values())
        assert all(agreement(tmp_path, sequence, 0, 1) < 0.02 for sequence in sequences)
        jobs = [_Job(tmp_path, category, number, options) for number in range(2)]
        scenes[name] = [_scene(job, np.random.default_rng(job.sequence)) for job in jobs]
    for one, other in scenes.values():
        assert one.walls == other.walls and len(set(one.walls)) == 6 and one.is_papered
        assert np.array_equal(one.light, other.light) and one.solids[0].half[0] != other.solids[0].half[0]
    assert scenes["apple"][0].walls != scenes["cup"][0].walls


def test_toy_refuses_another_tree_in_its_folder(tmp_path: Path) -> None:
    prepare_toy(tmp_path, ToyOptions(categories=("cup",), sequences=1, frames=1, size=16))
    with pytest.raises(PrepareError, match="another tree"):
        prepare_toy(tmp_path, ToyOptions(categories=("ball",), sequences=1, frames=1, size=16))
