"""What the readers of evaluation sets hand out: sequences of frames, with the truth that each set has."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DepthReader = Callable[[Path], np.ndarray]


@dataclass(frozen=True)
class ViewFrame:
    """One picture of a set; conventions of `restrike.geometry.conventions`.

    Attributes:
        image: its file, relative to the set's root.
        depth: the same of its true depth; None where the protocol needs none.
        intrinsics: float64 [3, 3], pixels of the stored picture, corner origin; None where unknown.
        camera_to_world: float64 [3, 4]; None where unknown, or where the set's own tracking failed.
    """

    image: str
    depth: str | None = None
    intrinsics: np.ndarray | None = None
    camera_to_world: np.ndarray | None = None


@dataclass(frozen=True)
class ViewSequence:
    """Frames that a network sees together or one after another.

    Attributes:
        name: unique in its set.
        frames: in the order in which they are shown.
        read_depth: float32 [H, W] z-depth of a frame's file, 0 where unknown; metres but for Sintel.
    """

    name: str
    frames: list[ViewFrame]
    read_depth: DepthReader | None = None


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts numbers in names by value."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, in natural order; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((entry.name for entry in folder.iterdir() if entry.is_dir()), key=natural_key)


def files_in(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """Names of the files in a folder that end so, in natural order; none where there is no such folder."""
    if not folder.is_dir():
        return []
    endings = tuple(suffixes)
    names = (entry.name for entry in folder.iterdir() if entry.name.lower().endswith(endings))
    return sorted((name for name in names if not name.startswith(".")), key=natural_key)


def require_folder(root: Path, expected: str) -> None:
    """Check that there is something to look into.

    Raises:
        ValueError: no such folder; says what belongs there.
    """
    if not root.is_dir():
        raise ValueError(f"data.root: no folder {root}; expected {root / expected}")


def require_file(path: Path, why: str) -> Path:
    """A file that has to be there.

    Raises:
        ValueError: it is not, or it is empty.
    """
    if not path.is_file() or path.stat().st_size == 0:
        what = "an empty file" if path.is_file() else "no such file"
        raise ValueError(f"data.root: {path}: {what}; {why}")
    return path


def choose(found: Sequence[str], published: Sequence[str], root: Path, expected: str) -> list[str]:
    """Those of the published sequences that are there, in the published order.

    Raises:
        ValueError: none is; says what was found, and what was expected.
    """
    chosen = [name for name in published if name in set(found)]
    if not chosen:
        there = (
            f"found {', '.join(found[:3])}{' …' if len(found) > 3 else ''}" if found else "found nothing of the kind"
        )
        raise ValueError(f"data.root: {root} has none of the protocol's sequences: expected {expected}, {there}")
    return chosen


def invert_pose(transform: np.ndarray) -> np.ndarray:
    """world_to_camera [3, 4] to camera_to_world, and back; not by `restrike.geometry`, which wants tensors."""
    rotation = transform[:, :3].T
    return np.concatenate([rotation, -rotation @ transform[:, 3:]], axis=1)


def pinhole(fx: float, fy: float, cx: float, cy: float, first_pixel: float = 0.0) -> np.ndarray:
    """Intrinsics with a corner origin from a principal point that counts the first pixel's centre as `first_pixel`."""
    shift = 0.5 - first_pixel
    return np.array([[fx, 0, cx + shift], [0, fy, cy + shift], [0, 0, 1]], dtype=np.float64)


def from_calibration(matrix: np.ndarray) -> np.ndarray:
    """The same of a calibration's matrix, whose first pixel's centre is 0."""
    return pinhole(matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2])
