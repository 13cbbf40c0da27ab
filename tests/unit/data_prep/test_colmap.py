"""Damaged COLMAP models: one message, with the file, the picture or the line, and the mend."""

import struct
from pathlib import Path

import numpy as np
import pytest

from own_scene_layouts import SIZE, shots, write_colmap
from restrike.data_prep.colmap import read_colmap, read_model
from restrike.data_prep.errors import PrepareError


def test_text_and_binary_models_are_equal(tmp_path: Path) -> None:
    text, binary = (
        read_model(write_colmap(tmp_path / name, shots(), is_binary) / "sparse" / "0")
        for name, is_binary in (("text", False), ("binary", True))
    )
    assert [image.name for image in text.images] == [image.name for image in binary.images]
    for a, b in zip(text.images, binary.images, strict=True):
        np.testing.assert_array_equal(a.qvec, b.qvec)
        np.testing.assert_array_equal(a.tvec, b.tvec)
        np.testing.assert_array_equal(a.points, b.points)
    assert text.cameras.keys() == binary.cameras.keys() == {7}
    assert text.cameras[7].model == "PINHOLE" and text.cameras[7].size == binary.cameras[7].size == SIZE
    assert text.points.keys() == binary.points.keys()
    np.testing.assert_array_equal(text.points[5], binary.points[5])


def test_a_picture_that_saw_nothing_has_no_depth(tmp_path: Path) -> None:
    folder = write_colmap(tmp_path / "desk", shots(), is_binary=False)
    path = folder / "sparse" / "0" / "images.txt"
    lines = path.read_text().splitlines()
    lines[2] = ""
    path.write_text("\n".join(lines) + "\n")
    scene = read_colmap(folder, "desk")
    assert scene.frames[0].depth is None and scene.frames[1].depth is not None and len(scene.frames) == 6


@pytest.mark.parametrize("kind", ["cameras", "images", "points3D"])
def test_a_truncated_binary_file_is_named(tmp_path: Path, kind: str) -> None:
    folder = write_colmap(tmp_path / "desk", shots())
    path = folder / "sparse" / "0" / f"{kind}.bin"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PrepareError, match=rf"{kind}.bin is truncated .*export the model again"):
        read_colmap(folder, "desk")


@pytest.mark.parametrize(
    ("kind", "line", "text", "expected"),
    [
        ("cameras", 1, "7 PINHOLE wide 72 1 2 3 4", "cameras.txt, line 2: expected numbers, got '7 wide 72'"),
        ("cameras", 1, "7 PINHOLE", "cameras.txt, line 2: expected id, model, width"),
        ("cameras", 1, "7 PINHOLE 96 72 100 100 50", r"picture '000.jpg': parameters of COLMAP's PINHOLE: expected"),
        ("cameras", 1, "7 FULL_OPENCV 96 72 1 2 3 4", "'FULL_OPENCV': expected one of .*image_undistorter"),
        ("cameras", 1, "8 PINHOLE 96 72 100 100 50 35", "camera 7 is not in .*cameras.txt; export the model again"),
        ("cameras", 1, "7 PINHOLE 96 72 -100 100 50 35", "'000.jpg'.* has a focal length that is not positive"),
        ("cameras", 1, "7 PINHOLE 96 72 nan 100 50 35", "'000.jpg'.* has a value that is not finite"),
        ("images", 1, "1 0.5 0.5", "images.txt, line 2: expected id, quaternion"),
        ("images", 2, "1.0 2.0 x", "images.txt, line 3: expected numbers, got 'x'"),
        ("points3D", 1, "1 2", "points3D.txt, line 2: expected id and position"),
    ],
)
def test_a_bad_line_of_a_text_model_is_named(tmp_path: Path, kind: str, line: int, text: str, expected: str) -> None:
    folder = write_colmap(tmp_path / "desk", shots(), is_binary=False)
    path = folder / "sparse" / "0" / f"{kind}.txt"
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(PrepareError, match=expected):
        read_colmap(folder, "desk")


def test_missing_parts_of_a_scene_are_named(tmp_path: Path) -> None:
    folder = write_colmap(tmp_path / "desk", shots())
    (folder / "sparse" / "0" / "cameras.bin").unlink()
    with pytest.raises(PrepareError, match="cameras.bin is missing; export the whole model"):
        read_colmap(folder, "desk")
    with pytest.raises(PrepareError, match="no folder .*/pictures; say where the pictures"):
        read_colmap(write_colmap(tmp_path / "wall", shots()), "wall", "pictures")
    with pytest.raises(PrepareError, match="has no COLMAP model"):
        read_colmap(tmp_path, "nothing")


def test_an_unknown_binary_lens_is_refused(tmp_path: Path) -> None:
    folder = write_colmap(tmp_path / "desk", shots())
    path = folder / "sparse" / "0" / "cameras.bin"
    path.write_bytes(struct.pack("<QiiQQ", 1, 7, 99, 96, 72) + bytes(96))
    with pytest.raises(PrepareError, match="camera 7 has the unknown model 99; run `colmap image_undistorter`"):
        read_colmap(folder, "desk")
