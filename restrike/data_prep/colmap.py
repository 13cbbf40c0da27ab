"""A COLMAP model, text or binary: cameras, pictures and the sparse points that each picture saw.

COLMAP shares our axes and our corner origin. Sparse points become sparse depth; where the dense step ran, its depth
maps are taken instead. Formats: COLMAP's documentation, "Output Format".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from restrike.data_prep.errors import PrepareError
from restrike.data_prep.own_frames import DepthFile, Lens, OwnFrame, OwnScene
from restrike.geometry import check_cameras, from_colmap

# Name and number of parameters by the id of the binary format.
_MODELS = {
    0: ("SIMPLE_PINHOLE", 3), 1: ("PINHOLE", 4), 2: ("SIMPLE_RADIAL", 4), 3: ("RADIAL", 5), 4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8), 6: ("FULL_OPENCV", 12), 7: ("FOV", 5), 8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5), 10: ("THIN_PRISM_FISHEYE", 12),
}  # fmt: skip
_MODEL_PLACES = ("sparse/0", "sparse", "colmap/sparse/0", ".")
_UNDISTORT = "run `colmap image_undistorter` and give its output folder"
_NO_POINT = -1


class ColmapCamera(NamedTuple):
    """Model, (H, W) and parameters."""

    model: str
    size: tuple[int, int]
    params: np.ndarray


class ColmapImage(NamedTuple):
    """File name, camera id, pose (qvec scalar first, world to camera), and ids of the points that it saw."""

    name: str
    camera: int
    qvec: np.ndarray
    tvec: np.ndarray
    points: np.ndarray


class ColmapModel(NamedTuple):
    """Cameras by id, pictures, points by id, and the files that they came from."""

    cameras: dict[int, ColmapCamera]
    images: list[ColmapImage]
    points: dict[int, np.ndarray]
    files: list[Path]


def find_model(folder: Path) -> Path | None:
    """The folder of a scene's model: sparse/0, sparse, colmap/sparse/0 or the folder itself."""
    for place in _MODEL_PLACES:
        if any((folder / place / f"images.{suffix}").is_file() for suffix in ("bin", "txt")):
            return folder / place
    return None


def read_colmap(folder: Path, name: str, images: str | None = None) -> OwnScene:
    """A scene from its COLMAP model and its pictures.

    Args:
        folder: of the scene.
        name: of the scene.
        images: folder of the pictures inside it; None = "images".

    Raises:
        PrepareError: no model, a damaged one, a lens that cannot be undone, or no pictures; names file and mend.
    """
    place = find_model(folder)
    if place is None:
        raise PrepareError(f"--src: {folder} has no COLMAP model (sparse/0/images.bin or .txt)")
    model = read_model(place)
    picture_folder = images or "images"
    if not (folder / picture_folder).is_dir():
        raise PrepareError(f"--images: no folder {folder / picture_folder}; say where the pictures of {place} lie")
    frames = []
    for entry in sorted(model.images, key=lambda entry: entry.name):
        label = f"{model.files[1]}: picture '{entry.name}'"
        if entry.camera not in model.cameras:
            raise PrepareError(f"{label}: camera {entry.camera} is not in {model.files[0]}; export the model again")
        camera, lens = _camera(entry, model.cameras[entry.camera], label)
        path = f"{picture_folder}/{entry.name}"
        frames.append(OwnFrame(path, lens, camera, _depth(folder, entry, model.points)))
    if not frames:
        raise PrepareError(f"{model.files[1]}: the model has no picture; run the mapper again")
    return OwnScene(name, folder, "colmap", frames, model.files)


def read_model(place: Path) -> ColmapModel:
    """cameras, images and points3D, binary where both are there.

    Raises:
        PrepareError: a file is missing, truncated, or of another format.
    """
    suffix = "bin" if (place / "images.bin").is_file() else "txt"
    files = [place / f"{kind}.{suffix}" for kind in ("cameras", "images", "points3D")]
    for path in files[:2]:
        if not path.is_file():
            raise PrepareError(f"{path} is missing; export the whole model (`colmap model_converter`)")
    has_points = files[2].is_file()
    try:
        if suffix == "bin":
            cameras, images = _binary_cameras(files[0]), _binary_images(files[1])
            points = _binary_points(files[2]) if has_points else {}
        else:
            cameras, images = _text_cameras(files[0]), _text_images(files[1])
            points = _text_points(files[2]) if has_points else {}
    except _Damaged as error:
        raise PrepareError(f"{error}; export the model again (`colmap model_converter`)") from None
    return ColmapModel(cameras, images, points, files if has_points else files[:2])


class _Damaged(ValueError):
    pass


def _camera(entry: ColmapImage, camera: ColmapCamera, label: str) -> tuple[np.ndarray, Lens]:
    qvec, tvec = torch.from_numpy(entry.qvec), torch.from_numpy(entry.tvec)
    try:
        pose, intrinsics = from_colmap(qvec, tvec, camera.model, torch.from_numpy(camera.params), math.inf)
        check_cameras(pose, intrinsics, label)
    except ValueError as error:
        raise PrepareError(f"{label}: {error}" if label not in str(error) else str(error)) from None
    values = camera.params
    distortion = {
        "SIMPLE_RADIAL": lambda: (values[3], 0.0, 0.0, 0.0),
        "RADIAL": lambda: (values[3], values[4], 0.0, 0.0),
        "OPENCV": lambda: tuple(values[4:8]),
    }.get(camera.model, lambda: (0.0, 0.0, 0.0, 0.0))()
    k1, k2, p1, p2 = (float(value) for value in distortion)
    return pose.numpy(), Lens(camera.size, intrinsics.numpy(), (k1, k2, p1, p2))


def _depth(folder: Path, entry: ColmapImage, points: dict[int, np.ndarray]) -> DepthFile | np.ndarray | None:
    dense = f"stereo/depth_maps/{entry.name}.geometric.bin"
    if (folder / dense).is_file():
        return DepthFile(dense, 1.0)
    seen = [points[point] for point in entry.points.tolist() if point in points]
    return np.stack(seen) if seen else None


class _Reader:
    """Little-endian fields of a file; says which file ended too soon."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def take(self, form: str) -> tuple:
        layout = struct.Struct(f"<{form}")
        self._need(layout.size)
        self.at += layout.size
        return layout.unpack_from(self.data, self.at - layout.size)

    def array(self, layout: np.dtype, count: int) -> np.ndarray:
        self._need(layout.itemsize * count)
        self.at += layout.itemsize * count
        return np.frombuffer(self.data, layout, count, self.at - layout.itemsize * count)

    def text(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise _Damaged(f"{self.path} is truncated")
        text = self.data[self.at : end].decode("utf-8", "replace")
        self.at = end + 1
        return text

    def _need(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise _Damaged(f"{self.path} is truncated ({len(self.data)} bytes)")


def _binary_cameras(path: Path) -> dict[int, ColmapCamera]:
    reader, cameras = _Reader(path), {}
    for _ in range(reader.take("Q")[0]):
        key, model, width, height = reader.take("iiQQ")
        if model not in _MODELS:
            raise PrepareError(f"{path}: camera {key} has the unknown model {model}; {_UNDISTORT}")
        name, count = _MODELS[model]
        cameras[key] = ColmapCamera(name, (height, width), reader.array(np.dtype("<f8"), count).copy())
    return cameras


def _binary_images(path: Path) -> list[ColmapImage]:
    reader, images = _Reader(path), []
    for _ in range(reader.take("Q")[0]):
        _, *pose, camera = reader.take("i7di")
        name = reader.text()
        layout = np.dtype([("at", "<f8", 2), ("point", "<i8")])
        points = reader.array(layout, reader.take("Q")[0])["point"]
        images.append(ColmapImage(name, camera, np.array(pose[:4]), np.array(pose[4:]), points[points != _NO_POINT]))
    return images


def _binary_points(path: Path) -> dict[int, np.ndarray]:
    reader, points = _Reader(path), {}
    for _ in range(reader.take("Q")[0]):
        key, x, y, z, _, _, _, _, length = reader.take("Q3d3BdQ")
        reader.array(np.dtype("<i4"), 2 * length)
        points[key] = np.array([x, y, z])
    return points


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Numbered lines, split, without comments; empty lines are kept, for a picture without points has one."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.startswith("#"):
            yield number, line.split()


def _numbers(path: Path, line: int, words: list[str]) -> np.ndarray:
    try:
        return np.array(words, dtype=np.float64)
    except ValueError:
        raise _Damaged(f"{path}, line {line}: expected numbers, got '{' '.join(words)[:60]}'") from None


def _text_cameras(path: Path) -> dict[int, ColmapCamera]:
    cameras = {}
    for number, words in _lines(path):
        if not words:
            continue
        if len(words) < 5:
            raise _Damaged(f"{path}, line {number}: expected id, model, width, height and parameters")
        key, width, height = _numbers(path, number, [words[0], *words[2:4]]).astype(int).tolist()
        cameras[key] = ColmapCamera(words[1], (height, width), _numbers(path, number, words[4:]))
    return cameras


def _text_images(path: Path) -> list[ColmapImage]:
    images: list[ColmapImage] = []
    lines = _lines(path)
    for number, words in lines:
        if not words:
            continue
        if len(words) < 10:
            raise _Damaged(f"{path}, line {number}: expected id, quaternion, translation, camera and name")
        pose = _numbers(path, number, words[1:8])
        camera = int(_numbers(path, number, words[8:9])[0])
        at, seen = next(lines, (number, []))
        points = _numbers(path, at, seen[2::3]).astype(np.int64)
        images.append(ColmapImage(" ".join(words[9:]), camera, pose[:4], pose[4:], points[points != _NO_POINT]))
    return images


def _text_points(path: Path) -> dict[int, np.ndarray]:
    points = {}
    for number, words in _lines(path):
        if words:
            values = _numbers(path, number, words[:4])
            if len(values) < 4:
                raise _Damaged(f"{path}, line {number}: expected id and position")
            points[int(values[0])] = values[1:]
    return points
