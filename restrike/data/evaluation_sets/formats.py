"""The file formats of evaluation sets: depth in integer PNGs, Sintel's binary depth and cameras, matrices as text.

Every reader names the file and what was expected in its error.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

_SINTEL_MAGIC = np.float32(202021.25)  # "PIEH" as a little-endian float
_HEADER_BYTES = 12


class SintelCamera(NamedTuple):
    """Intrinsics float64 [3, 3] as stored; world_to_camera float64 [3, 4]."""

    intrinsics: np.ndarray
    world_to_camera: np.ndarray


def read_depth_png(path: Path, per_meter: float, unknown: int = 0) -> np.ndarray:
    """Depth in metres, float32 [H, W], 0 where unknown.

    Args:
        path: A 16-bit grey PNG.
        per_meter: Its steps in a metre.
        unknown: Its value where depth was not measured, beside 0.

    Raises:
        ValueError: missing, damaged, or no 16-bit grey PNG.
    """
    data = _read(path)
    steps = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if steps is None or b"IEND" not in data[-16:]:  # OpenCV returns what it could read of a truncated file
        raise ValueError(f"{path}: not a whole PNG ({len(data)} bytes)")
    if steps.dtype != np.uint16 or steps.ndim != 2:
        raise ValueError(f"{path}: expected depth as a 16-bit grey PNG, got {steps.dtype} {list(steps.shape)}")
    return np.where(steps == unknown, 0, steps).astype(np.float32) / np.float32(per_meter)


def read_sintel_depth(path: Path) -> np.ndarray:
    """Sintel's .dpt: float32 [H, W], in the film's unit.

    Raises:
        ValueError: missing, another format, or of another length than its header says.
    """
    data = _read(path)
    _check_magic(data, path, "depth (.dpt)")
    width, height = np.frombuffer(data, "<i4", count=2, offset=4) if len(data) >= _HEADER_BYTES else (0, 0)
    if width < 1 or height < 1 or len(data) != _HEADER_BYTES + 4 * int(width) * int(height):
        raise ValueError(f"{path}: its header says {height} x {width} pixels, which are not its {len(data)} bytes")
    depth = np.frombuffer(data, "<f4", offset=_HEADER_BYTES).reshape(height, width)
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)


def read_sintel_camera(path: Path) -> SintelCamera:
    """Sintel's .cam.

    Raises:
        ValueError: missing, another format, or of another length.
    """
    data = _read(path)
    _check_magic(data, path, "camera (.cam)")
    if len(data) != 4 + 21 * 8:
        raise ValueError(f"{path}: expected {4 + 21 * 8} bytes of a Sintel camera, got {len(data)}")
    numbers = np.frombuffer(data, "<f8", offset=4)
    return SintelCamera(numbers[:9].reshape(3, 3).copy(), numbers[9:].reshape(3, 4).copy())


def read_matrix(path: Path, rows: int, columns: int = 4) -> np.ndarray:
    """Numbers in a text file, float64 [rows, columns]; NaN and inf are numbers here.

    Raises:
        ValueError: missing, no numbers, or another count of them.
    """
    try:
        values = np.array(_read(path).decode().replace(",", " ").split(), dtype=np.float64)
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{path}: expected {rows} x {columns} numbers ({error})") from None
    if values.size != rows * columns:
        raise ValueError(f"{path}: expected {rows} x {columns} numbers, got {values.size}")
    return values.reshape(rows, columns)


def read_pose(path: Path) -> np.ndarray | None:
    """A 4 x 4 camera_to_world as [3, 4]; None where it is not finite, as where tracking failed.

    Raises:
        ValueError: as `read_matrix`.
    """
    pose = read_matrix(path, 4)[:3]
    return pose if np.isfinite(pose).all() else None


def read_table(path: Path, columns: int) -> list[list[str]]:
    """Words of the lines of a text file that are no comments.

    Raises:
        ValueError: missing, or a line with fewer words.
    """
    rows = []
    for number, line in enumerate(_read(path).decode(errors="replace").splitlines(), start=1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) < columns:
            raise ValueError(f"{path}, line {number}: expected {columns} words, got {len(words)}: {line[:60]!r}")
        rows.append(words)
    return rows


def numbers_of(words: list[str], path: Path) -> list[float]:
    """Words as numbers.

    Raises:
        ValueError: one is none; names the file.
    """
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_magic(data: bytes, path: Path, what: str) -> None:
    if len(data) < 4 or np.frombuffer(data, "<f4", count=1)[0] != _SINTEL_MAGIC:
        raise ValueError(f"{path}: no Sintel {what}: it does not begin with {_SINTEL_MAGIC}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
