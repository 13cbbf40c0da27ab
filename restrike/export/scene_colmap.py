"""A scene as a COLMAP model, binary and text (COLMAP's documentation, "Output Format").

Axes and pixels are COLMAP's already. Every photo has a PINHOLE camera of its own, as networks predict one for each. A
point is a track of one photo, with error 0: nobody matched it.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from torch import Tensor

from restrike.export.scene import PhotoCameras, ScenePoints
from restrike.geometry import to_colmap

_PINHOLE = 1  # COLMAP's number of the model
_SEEN = np.dtype([("pixel", "<f8", 2), ("point", "<i8")])
_POINT = np.dtype(
    [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8"), ("track", "<i4", 2)]
)


def write_colmap(folder: Path, cameras: PhotoCameras, points: ScenePoints) -> Path:
    """Write cameras, images and points3D, each as .bin and .txt.

    Args:
        folder: Of the model, "sparse/0" by custom; made where it is missing.
        cameras: Of the photos; names are relative to the folder of images.
        points: Of them.

    Raises:
        ValueError: a name with a blank, by which the text format parts words.
    """
    if spaced := [name for name in cameras.names if len(name.split()) != 1]:
        raise ValueError(f"COLMAP's text files cannot hold the name {spaced[0]!r}: it has a blank")
    folder.mkdir(parents=True, exist_ok=True)
    quaternions, translations, parameters = (
        x.double().numpy() for x in to_colmap(cameras.world_to_camera, cameras.intrinsics)
    )
    table, seen = _points(points, len(cameras))
    _write_binary(folder, cameras, parameters, np.concatenate([quaternions, translations], axis=1), table, seen)
    _write_text(folder, cameras, parameters, np.concatenate([quaternions, translations], axis=1), table, seen)
    return folder


def _points(points: ScenePoints, views: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Points by id from 1, and what each photo sees of them."""
    table = np.zeros(len(points.points), _POINT)
    table["id"] = np.arange(1, len(table) + 1)
    table["xyz"], table["rgb"], table["length"] = _array(points.points), _array(points.colors), 1
    seen = []
    owners = _array(points.views)
    for view in range(views):
        rows = np.flatnonzero(owners == view)
        table["track"][rows] = np.stack([np.full(len(rows), view + 1), np.arange(len(rows))], axis=1)
        entry = np.zeros(len(rows), _SEEN)
        entry["pixel"], entry["point"] = _array(points.pixels)[rows], table["id"][rows]
        seen.append(entry)
    return table, seen


def _write_binary(
    folder: Path,
    cameras: PhotoCameras,
    parameters: np.ndarray,
    poses: np.ndarray,
    table: np.ndarray,
    seen: list[np.ndarray],
) -> None:
    with (folder / "cameras.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(cameras)))
        for view, (height, width) in enumerate(cameras.sizes.tolist()):
            file.write(struct.pack("<iiQQ4d", view + 1, _PINHOLE, width, height, *parameters[view]))
    with (folder / "images.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(cameras)))
        for view, name in enumerate(cameras.names):
            file.write(struct.pack("<i7di", view + 1, *poses[view], view + 1) + name.encode() + b"\0")
            file.write(struct.pack("<Q", len(seen[view])) + seen[view].tobytes())
    with (folder / "points3D.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(table)) + table.tobytes())


def _write_text(
    folder: Path,
    cameras: PhotoCameras,
    parameters: np.ndarray,
    poses: np.ndarray,
    table: np.ndarray,
    seen: list[np.ndarray],
) -> None:
    with (folder / "cameras.txt").open("w", encoding="utf-8") as file:
        file.write(f"# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n# Number of cameras: {len(cameras)}\n")
        for view, (height, width) in enumerate(cameras.sizes.tolist()):
            file.write(f"{view + 1} PINHOLE {width} {height} {_words(parameters[view])}\n")
    with (folder / "images.txt").open("w", encoding="utf-8") as file:
        file.write("# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n# POINTS2D[] as (X, Y, POINT3D_ID)\n")
        for view, name in enumerate(cameras.names):
            file.write(f"{view + 1} {_words(poses[view])} {view + 1} {name}\n")
            pairs = zip(seen[view]["pixel"].tolist(), seen[view]["point"].tolist(), strict=True)
            file.write(" ".join(f"{x:.3f} {y:.3f} {point}" for (x, y), point in pairs) + "\n")
    with (folder / "points3D.txt").open("w", encoding="utf-8") as file:
        file.write("# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)\n")
        columns = (table[name].tolist() for name in ("id", "xyz", "rgb", "track"))
        for key, xyz, rgb, track in zip(*columns, strict=True):
            file.write(f"{key} {_words(xyz)} {rgb[0]} {rgb[1]} {rgb[2]} 0 {track[0]} {track[1]}\n")


def _words(values: np.ndarray | list[float]) -> str:
    return " ".join(f"{value:.12g}" for value in values)


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
