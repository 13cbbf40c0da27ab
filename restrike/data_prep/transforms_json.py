"""transforms.json of instant-ngp, nerfstudio and Blender's NeRF scenes: OpenGL cameras, with or without depth maps.

`transform_matrix` is camera_to_world with x right, y up, z backward; only the camera's axes turn, the world stays.
Principal points count from the picture's corner. Intrinsics stand in the file, or in each frame, which wins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from restrike.data_prep.errors import PrepareError
from restrike.data_prep.own_frames import DepthFile, Lens, OwnFrame, OwnScene
from restrike.geometry import check_cameras, from_opengl

FILE_NAME = "transforms.json"
SPLIT_NAMES = {"train": "transforms_train.json", "val": "transforms_val.json", "test": "transforms_test.json"}
_PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
_DISTORTION = ("k1", "k2", "p1", "p2")
_MORE_DISTORTION = ("k3", "k4", "k5", "k6")


def transforms_files(folder: Path) -> dict[str | None, Path]:
    """The files of a scene's folder by part; None where one file holds all."""
    if (folder / FILE_NAME).is_file():
        return {None: folder / FILE_NAME}
    return {part: folder / name for part, name in SPLIT_NAMES.items() if (folder / name).is_file()}


def read_transforms(folder: Path, name: str, depth_unit: float = 1e-3) -> OwnScene:
    """A scene from its transforms.json, or from transforms_train.json, _val and _test.

    Args:
        folder: of the scene; paths in the file are relative to it.
        name: of the scene.
        depth_unit: scene units per count of a 16-bit depth PNG (0.001: millimetres in a scene of metres).

    Raises:
        PrepareError: no such file, or one that is no transforms.json; names file, frame and mend.
    """
    files = transforms_files(folder)
    if not files:
        raise PrepareError(f"--src: {folder} has no {FILE_NAME}")
    frames = [frame for part, path in files.items() for frame in _read_file(folder, path, part, depth_unit)]
    if not frames:
        raise PrepareError(f"{', '.join(map(str, files.values()))}: no frames")
    frames.sort(key=lambda frame: frame.path)
    for before, after in pairwise(frames):
        if before.path == after.path:
            raise PrepareError(f"{next(iter(files.values()))}: '{after.path}' comes twice; keep one entry")
    return OwnScene(name, folder, "transforms", frames, list(files.values()))


def _read_file(folder: Path, path: Path, part: str | None, depth_unit: float) -> Iterator[OwnFrame]:
    try:
        content = json.loads(path.read_bytes())
        entries = content["frames"]
        named = {key: set(content.get(f"{key}_filenames", ())) for key in ("train", "val", "test")}
        assert isinstance(entries, list)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise PrepareError(
            f'{path}: expected {{"frames": [{{"file_path": …, "transform_matrix": …}}, …]}} '
            f"({type(error).__name__}: {error}); write the file again"
        ) from None
    for number, entry in enumerate(entries):
        label = f"{path}: frame {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("file_path"), str):
            raise PrepareError(f"{label} has no file_path; drop the entry or mend it")
        file_path = _with_suffix(folder, entry["file_path"])
        label = f"{label} ('{file_path}')"
        about = {key: value for key, value in content.items() if key != "frames"} | entry
        own_part = next((key for key, names in named.items() if entry["file_path"] in names), part)
        depth = entry.get("depth_file_path")
        yield OwnFrame(
            file_path,
            _lens(about, folder / file_path, label),
            _camera(entry.get("transform_matrix"), label),
            DepthFile(_plain(depth), depth_unit) if depth else None,
            _plain(entry["mask_path"]) if entry.get("mask_path") else None,
            own_part,
        )


def _plain(path: str) -> str:
    return path.removeprefix("./")


def _with_suffix(folder: Path, path: str) -> str:
    """Blender's scenes leave out ".png"."""
    path = _plain(path)
    if Path(path).suffix or (folder / path).is_file():
        return path
    return next((f"{path}{suffix}" for suffix in (".png", ".jpg") if (folder / f"{path}{suffix}").is_file()), path)


def _lens(about: dict[str, Any], picture: Path, label: str) -> Lens:
    model = str(about.get("camera_model", "OPENCV")).upper()
    if model not in _PINHOLES or about.get("is_fisheye"):
        raise PrepareError(
            f"{label}: camera_model {'fisheye' if about.get('is_fisheye') else model} is no pinhole; undistort the "
            f"pictures first (`colmap image_undistorter`), or use one of {', '.join(_PINHOLES)}"
        )
    try:
        values = {
            key: float(about[key])
            for key in ("w", "h", "fl_x", "fl_y", "cx", "cy", "camera_angle_x", "camera_angle_y", *_DISTORTION,
                        *_MORE_DISTORTION)
            if about.get(key) is not None
        }  # fmt: skip
    except (TypeError, ValueError) as error:
        raise PrepareError(f"{label}: an intrinsic value is no number ({error}); mend it") from None
    if any(abs(values.get(key, 0.0)) > 1e-6 for key in _MORE_DISTORTION):
        raise PrepareError(f"{label}: distortion beyond k1, k2, p1, p2; undistort the pictures first")
    height, width = int(values.get("h", 0)), int(values.get("w", 0))
    if not height or not width:
        height, width = _picture_size(picture)
    focal_x = values.get("fl_x") or _focal(values.get("camera_angle_x"), width)
    focal_y = values.get("fl_y") or _focal(values.get("camera_angle_y"), height) or focal_x
    if not focal_x:
        raise PrepareError(f"{label}: neither fl_x nor camera_angle_x; add one of them")
    center = values.get("cx", width / 2), values.get("cy", height / 2)
    intrinsics = np.array([[focal_x, 0, center[0]], [0, focal_y, center[1]], [0, 0, 1.0]])
    k1, k2, p1, p2 = (values.get(key, 0.0) for key in _DISTORTION)
    return Lens((height, width), intrinsics, (k1, k2, p1, p2))


def _focal(angle: float | None, pixels: int) -> float:
    return 0.5 * pixels / math.tan(0.5 * angle) if angle else 0.0


def _picture_size(path: Path) -> tuple[int, int]:
    """(1, 1) of a picture that cannot be read: whoever reads its pixels names it."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except OSError:
        return 1, 1


def _camera(matrix: Any, label: str) -> np.ndarray:
    try:
        values = torch.tensor(matrix, dtype=torch.float64)
        assert values.shape in ((4, 4), (3, 4))
    except (TypeError, ValueError, AssertionError, RuntimeError):
        raise PrepareError(f"{label}: transform_matrix is no 4 x 4 matrix of numbers; mend it") from None
    camera = from_opengl(values[:3])
    try:
        check_cameras(camera, torch.eye(3, dtype=torch.float64), label)
    except ValueError as error:
        raise PrepareError(f"{error}; a scaled transform_matrix is none: move the scale into the positions") from None
    return camera.numpy()
