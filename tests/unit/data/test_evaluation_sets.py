"""Readers of evaluation sets find exactly what lies in trees of the genuine layouts, and name what is wrong."""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from evaluation_trees import Tree, write_tree
from restrike.data.evaluation_sets import PROTOCOLS, open_view_set
from restrike.data.evaluation_sets.formats import read_depth_png, read_sintel_depth
from restrike.data.evaluation_sets.rgbd_lists import nearest_in_time


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, Tree]:
    return {name: write_tree(name, tmp_path_factory.mktemp(name)) for name in PROTOCOLS}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_reader_finds_the_frames_with_their_exact_truth(trees, name):
    tree = trees[name]
    found = open_view_set(name, tree.root)
    scored_by_frame = found.protocol.scoring == "frame_depth"
    shown = {sequence.name: [frame.image for frame in sequence.frames] for sequence in found.sequences}
    if scored_by_frame:
        assert shown == {image: [image] for image in tree.frames}
    elif name == "re10k":  # ten of twelve, in an order that was drawn
        assert {clip: len(set(images)) for clip, images in shown.items()} == dict.fromkeys(tree.sequences, 10)
        assert all(set(shown[clip]) <= set(tree.sequences[clip]) for clip in shown)
    else:
        assert shown == {sequence: list(frames) for sequence, frames in tree.sequences.items()}
    for sequence in found.sequences:
        for frame in sequence.frames:
            truth = tree.frames[frame.image]
            if frame.depth is not None:
                np.testing.assert_array_equal(sequence.read_depth(tree.root / frame.depth), truth.depth)
            if found.protocol.scoring in ("trajectory", "reconstruction", "relative_pose"):
                assert (frame.camera_to_world is None) == (truth.camera_to_world is None)
                if truth.camera_to_world is not None:
                    np.testing.assert_allclose(frame.camera_to_world, truth.camera_to_world, atol=1e-6)
            if frame.intrinsics is not None:
                np.testing.assert_allclose(frame.intrinsics, truth.intrinsics, atol=1e-9)
    assert found.protocol.scoring in ("trajectory", "relative_pose") or all(
        f.depth for s in found.sequences for f in s.frames
    )


@pytest.mark.parametrize("name", ["sintel-pose", "kitti-mono", "re10k"])
def test_the_frame_list_has_a_stable_hash_that_sees_every_file(trees, name, tmp_path):
    found = open_view_set(name, trees[name].root)
    moved = tmp_path / "elsewhere"
    shutil.copytree(trees[name].root, moved)
    again = open_view_set(name, moved)
    assert again.sha256 == found.sha256 and len(found.sha256) == 64
    assert found.sha256[:16] in found.description and found.protocol.title in found.description
    # None of these trees is the whole set, except where no number was published.
    assert found.is_whole in (False, None) and ("INCOMPLETE" in found.description) == (found.is_whole is False)


def test_the_hash_is_that_of_the_list_as_documented(trees):
    found = open_view_set("sintel-depth", trees["sintel-depth"].root)
    lines = [
        f"{sequence} {image} {image.replace('final', 'depth', 1).replace('.png', '.dpt')}\n"
        for sequence, frames in trees["sintel-depth"].sequences.items()
        for image in frames
    ]
    assert found.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    single = open_view_set("sintel-mono", trees["sintel-depth"].root)
    assert single.sha256 == found.sha256  # the same files, whatever is asked of them
    assert single.num_frames == found.num_frames == 8


def test_random_frames_depend_on_the_clip_alone(trees, tmp_path):
    whole = open_view_set("re10k", trees["re10k"].root)
    shutil.copytree(trees["re10k"].root, tmp_path / "few")
    (tmp_path / "few/test/000c3ab189999a83.txt").unlink()
    few = open_view_set("re10k", tmp_path / "few")
    assert [sequence.name for sequence in few.sequences] == ["ffe17d5c94b0b1e3"]
    same = next(sequence for sequence in whole.sequences if sequence.name == "ffe17d5c94b0b1e3")
    assert [f.image for f in few.sequences[0].frames] == [f.image for f in same.frames]
    assert [f.image for f in same.frames] != sorted(f.image for f in same.frames)


def test_published_counts_make_a_set_whole(tmp_path):
    tree = write_tree("sintel-depth", tmp_path)
    from restrike.data.evaluation_sets.sintel import SEQUENCES

    for sequence in SEQUENCES:
        for kind in ("final", "depth"):
            if not (tmp_path / f"training/{kind}/{sequence}").exists():
                shutil.copytree(tmp_path / f"training/{kind}/alley_2", tmp_path / f"training/{kind}/{sequence}")
    shutil.copytree(tmp_path / "training/final/alley_2", tmp_path / "training/final/bamboo_1")  # not of the protocol
    found = open_view_set("sintel-depth", tree.root)
    assert found.is_whole and [sequence.name for sequence in found.sequences] == list(SEQUENCES)
    assert "INCOMPLETE" not in found.description
    page = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    command = re.search(r"```bash\ncd MPI-Sintel && (.*?)```", page, re.DOTALL)[1]
    by_hand = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert by_hand.stdout.split()[0] == found.sha256


EXAMPLES = {
    "sintel-depth": "training/final/alley_2/frame_0001.png",
    "tum-pose": "rgbd_dataset_freiburg3_walking_xyz/rgb.txt",
    "bonn-depth": "rgbd_bonn_balloon2/rgb.txt",
    "kitti-depth": "proj_depth/groundtruth/image_02",
    "kitti-mono": "depth_selection/val_selection_cropped/image",
    "nyu-mono": "official_splits/test/bathroom/rgb_00045.jpg",
    "seven-scenes": "chess/TestSplit.txt",
    "nrgbd": "breakfast_room/images/img0.png",
    "scannet-pose": "scans_test/scene0707_00/color/0.jpg",
    "re10k": "test/000c3ab189999a83.txt",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_another_layout_is_named_with_the_right_one(tmp_path, name):
    with pytest.raises(ValueError, match=r"data\.root: no folder .*nowhere"):
        open_view_set(name, tmp_path / "nowhere")
    (tmp_path / "something" / "else").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"data\.root: .*expected") as error:
        open_view_set(name, tmp_path)
    assert EXAMPLES[name] in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "name, lost, message",
    [
        ("sintel-depth", "training/depth/temple_3/frame_0002.dpt", "every frame of temple_3 needs its depth"),
        ("sintel-pose", "training/camdata_left/alley_2/frame_0004.cam", "every frame of alley_2 needs its camera"),
        ("tum-pose", "rgbd_dataset_freiburg3_walking_xyz/groundtruth.txt", "the truth of trajectories is in it"),
        ("bonn-depth", "rgbd_bonn_balloon2/depth.txt", "it lists the frames"),
        ("kitti-depth", "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000006.png", "annotates it"),
        ("seven-scenes", "chess/seq-03/frame-000117.color.png", "lacks frame-000117.color.png"),
        ("seven-scenes", "chess/seq-03/frame-000200.pose.txt", "needs its pose"),
        ("seven-scenes", "chess/seq-03/frame-000200.depth.png", "needs its depth"),
        ("nrgbd", "staircase/depth/depth500.png", "needs its depth"),
        ("nrgbd", "staircase/images/img3.png", "expected 2000 x 4 numbers, got 8016"),
        ("scannet-pose", "scans_test/scene0806_00/pose/6.txt", "every frame needs its pose"),
        ("kitti-mono", None, "needs its depth"),
        ("nyu-mono", "official_splits/test/kitchen/sync_depth_00001.png", "needs its depth"),
    ],
)
def test_a_frame_without_its_truth_is_named(tmp_path, name, lost, message):
    tree = write_tree(name, tmp_path)
    path = tmp_path / lost if lost else next(tmp_path.rglob("groundtruth_depth/*.png"))
    path.unlink()
    with pytest.raises(ValueError, match=message) as error:
        open_view_set(name, tree.root)
    assert str(tmp_path) in str(error.value)


def test_a_pose_that_a_reconstruction_needs_must_be_known(tmp_path):
    write_tree("seven-scenes", tmp_path)
    (tmp_path / "chess/seq-03/frame-000200.pose.txt").write_text("nan " * 16)
    with pytest.raises(ValueError, match="frame-000200.color.png has no usable pose"):
        open_view_set("seven-scenes", tmp_path)


def test_a_trajectory_needs_three_poses(tmp_path):
    write_tree("scannet-pose", tmp_path)
    for pose in (tmp_path / "scans_test/scene0707_00/pose").iterdir():
        pose.write_text("-inf " * 16)
    with pytest.raises(ValueError, match="scene0707_00 has 0 frames with a pose"):
        open_view_set("scannet-pose", tmp_path)


def test_damaged_files_are_named_with_what_was_expected(tmp_path):
    depth = tmp_path / "frame_0001.dpt"
    for data, message in (
        (b"", "does not begin with 202021.25"),
        (struct.pack("<fii", 1.0, 2, 2) + bytes(16), "does not begin with 202021.25"),
        (struct.pack("<fii", 202021.25, 2, 2) + bytes(15), "its header says 2 x 2 pixels"),
        (struct.pack("<fi", 202021.25, 2), "its header says 0 x 0 pixels"),
    ):
        depth.write_bytes(data)
        with pytest.raises(ValueError, match=f"frame_0001.dpt: .*{message}"):
            read_sintel_depth(depth)
    picture = tmp_path / "depth.png"
    cv2.imwrite(str(picture), np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"depth.png: expected depth as a 16-bit grey PNG, got uint8 \[4, 4\]"):
        read_depth_png(picture, 1000)
    cv2.imwrite(str(picture), np.zeros((4, 4), np.uint16))
    picture.write_bytes(picture.read_bytes()[:-20])
    with pytest.raises(ValueError, match="depth.png: not a whole PNG"):
        read_depth_png(picture, 1000)
    with pytest.raises(ValueError, match="gone.png: No such file"):
        read_depth_png(Path("gone.png"), 1000)


def test_what_belongs_together_is_nearest_in_time():
    times, others = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.015, 0.99, 1.005, 2.5, 3.02])
    assert nearest_in_time(times, others).tolist() == [0, 2, -1, 4]
    assert nearest_in_time(times, others[:0]).tolist() == [-1] * 4
    assert nearest_in_time(times, others[:1]).tolist() == [0, -1, -1, -1]
