"""Sets of RGB-D cameras with lists of time stamps: TUM (Sturm et al. 2012) and Bonn (Palazzolo et al. 2019).

    rgbd_dataset_freiburg3_<sequence>/{rgb.txt, groundtruth.txt, rgb/<time stamp>.png}
    rgbd_bonn_<sequence>/{rgb.txt, depth.txt, rgb/<time stamp>.png, depth/<time stamp>.png}

Trap: the lists have clocks of their own. What belongs together is nearest in time, at most 20 ms apart (as in TUM's own
tool); a frame without a partner is left out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from restrike.data.evaluation_sets.formats import numbers_of, read_depth_png, read_table
from restrike.data.evaluation_sets.sequences import (
    ViewFrame,
    ViewSequence,
    choose,
    pinhole,
    require_file,
    require_folder,
    subfolders,
)
from restrike.geometry import quaternion_to_matrix

TUM_EXAMPLE = "rgbd_dataset_freiburg3_walking_xyz/rgb.txt"
TUM_SEQUENCES = tuple(
    f"rgbd_dataset_freiburg3_{kind}_{motion}"
    for kind in ("sitting", "walking")
    for motion in ("halfsphere", "rpy", "static", "xyz")
)
TUM_FRAMES, TUM_STEP = 90, 3
BONN_EXAMPLE = "rgbd_bonn_balloon2/rgb.txt"
BONN_SEQUENCES = tuple(
    f"rgbd_bonn_{name}" for name in ("balloon2", "crowd2", "crowd3", "person_tracking2", "synchronous")
)
BONN_FIRST, BONN_FRAMES = 30, 110
_MAX_DIFFERENCE_S = 0.02
_PER_METER = 5000
_TUM_CAMERA = pinhole(535.4, 539.2, 320.1, 247.6)  # freiburg3
_BONN_CAMERA = pinhole(542.822841, 542.576870, 315.593520, 237.756098)


def open_tum_dynamics(root: Path) -> list[ViewSequence]:
    """The eight dynamic sequences of freiburg3: every third frame that has a pose, 90 at most.

    Raises:
        ValueError: another layout, or a list that is missing or malformed.
    """
    require_folder(root, TUM_EXAMPLE)
    names = choose(subfolders(root), TUM_SEQUENCES, root, TUM_EXAMPLE)
    return [ViewSequence(name, _tum_frames(root, name)) for name in names]


def open_bonn(root: Path) -> list[ViewSequence]:
    """The five published sequences: 110 frames of each, from the 31st on.

    Raises:
        ValueError: another layout, a list that is missing or malformed, or a sequence without those frames.
    """
    require_folder(root, BONN_EXAMPLE)
    names = choose(subfolders(root), BONN_SEQUENCES, root, BONN_EXAMPLE)
    read_depth = partial(read_depth_png, per_meter=_PER_METER)
    return [ViewSequence(name, _bonn_frames(root, name), read_depth) for name in names]


def nearest_in_time(times: np.ndarray, others: np.ndarray, most: float = _MAX_DIFFERENCE_S) -> np.ndarray:
    """For each of `times`, the index of the nearest of `others`; -1 where that is further than `most` seconds.

    Args:
        times: float64 [N].
        others: float64 [M], ascending.
    """
    if len(others) == 0:
        return np.full(len(times), -1)
    right = np.searchsorted(others, times).clip(1, max(1, len(others) - 1))
    left = right - 1
    right = right.clip(max=len(others) - 1)
    nearest = np.where(np.abs(others[left] - times) <= np.abs(others[right] - times), left, right)
    # Time stamps are seconds since 1970 in float64, good to a microsecond.
    return np.where(np.abs(others[nearest] - times) <= most + 1e-6, nearest, -1)


def _tum_frames(root: Path, name: str) -> list[ViewFrame]:
    times, files = _list(root / name / "rgb.txt")
    path = require_file(root / name / "groundtruth.txt", "the truth of trajectories is in it")
    rows = sorted(numbers_of(words[:8], path) for words in read_table(path, 8))
    poses = np.array(rows, dtype=np.float64).reshape(-1, 8)
    partner = nearest_in_time(times, poses[:, 0])
    chosen = np.flatnonzero(partner >= 0)[::TUM_STEP][:TUM_FRAMES]
    if len(chosen) < 3:
        raise ValueError(f"data.root: {root / name}: {len(chosen)} frames of rgb.txt have a pose; 3 are the least")
    return [
        ViewFrame(
            _image(root, name, files[row]), None, _TUM_CAMERA, _tum_pose(poses[partner[row], 1:])
        )
        for row in chosen
    ]  # fmt: skip


def _bonn_frames(root: Path, name: str) -> list[ViewFrame]:
    times, files = _list(root / name / "rgb.txt")
    depth_times, depth_files = _list(root / name / "depth.txt")
    last = BONN_FIRST + BONN_FRAMES
    partner = nearest_in_time(times, depth_times)
    frames = [
        ViewFrame(_image(root, name, files[row]), _image(root, name, depth_files[partner[row]]), _BONN_CAMERA)
        for row in range(BONN_FIRST, min(last, len(files)))
        if partner[row] >= 0
    ]
    if not frames:
        raise ValueError(
            f"data.root: {root / name}: rgb.txt has {len(files)} frames; the protocol takes those from the "
            f"{BONN_FIRST + 1}st to the {last}th that have depth"
        )
    return frames


def _list(path: Path) -> tuple[np.ndarray, list[str]]:
    """Times, ascending, and files of a list."""
    require_file(path, "it lists the frames with their time stamps")
    rows = sorted((numbers_of(words[:1], path)[0], words[1]) for words in read_table(path, 2))
    return np.array([time for time, _ in rows], dtype=np.float64), [file for _, file in rows]


def _image(root: Path, name: str, file: str) -> str:
    require_file(root / name / file, "a list of the sequence names it")
    return f"{name}/{file}"


def _tum_pose(values: np.ndarray) -> np.ndarray:
    """camera_to_world [3, 4] of tx ty tz qx qy qz qw."""
    quaternion = torch.from_numpy(values[3:].copy())
    rotation = quaternion_to_matrix(quaternion, "xyzw").numpy()
    return np.concatenate([rotation, values[:3, None]], axis=1)
