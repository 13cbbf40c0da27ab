"""Indoor scans with depth and poses: 7-Scenes (Shotton et al. 2013), NRGBD (Azinović et al. 2022), ScanNet (Dai et al.
2017).

    <scene>/{TestSplit.txt, seq-01/frame-000000.{color.png, depth.png, pose.txt}}    7-Scenes
    <scene>/{poses.txt, focal.txt, images/img0.png, depth/depth0.png}                NRGBD
    scans_test/<scene>/{color/0.jpg, pose/0.txt, intrinsic/intrinsic_color.txt}      ScanNet, as its SensReader exports

Traps: 7-Scenes marks unknown depth as 65535; NRGBD's poses have OpenGL axes; ScanNet's are -inf where tracking failed.
Principal points count the first pixel's centre as 0.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from restrike.data.evaluation_sets.formats import read_depth_png, read_matrix, read_pose, read_table
from restrike.data.evaluation_sets.sequences import (
    ViewFrame,
    ViewSequence,
    files_in,
    from_calibration,
    pinhole,
    require_file,
    require_folder,
    subfolders,
)
from restrike.geometry import from_opengl, invert_se3

SEVEN_SCENES_EXAMPLE = "chess/seq-03/frame-000000.color.png"
SEVEN_SCENES_SEQUENCES, SEVEN_SCENES_STEP = 18, 200
NRGBD_EXAMPLE = "breakfast_room/images/img0.png"
NRGBD_STEP = 500
SCANNET_EXAMPLE = "scans_test/scene0707_00/color/0.jpg"
SCANNET_SCENES, SCANNET_FRAMES, SCANNET_STEP = 100, 90, 3
_SCANNET_TEST = re.compile(r"scene0(7(0[7-9]|[1-9]\d)|80[0-6])_00")  # 0707 to 0806, the first scan of each
_MAX_DEPTH_M = 10.0  # beyond what the depth cameras measure
_SEVEN_SCENES_FRAME = re.compile(r"frame-(\d{6})\.color\.png")
_SEVEN_SCENES_CAMERA = pinhole(525, 525, 320, 240)
_NRGBD_FOCAL = 554.2562584220408


def open_seven_scenes(root: Path) -> list[ViewSequence]:
    """Every 200th frame of each test sequence. Depth that was projected into the colour camera (depth.proj.png) is
    taken where it lies beside the sensor's.

    Raises:
        ValueError: another layout, or a frame without its depth or pose.
    """
    require_folder(root, SEVEN_SCENES_EXAMPLE)
    scenes = [scene for scene in subfolders(root) if (root / scene / "TestSplit.txt").is_file()]
    if not scenes:
        raise ValueError(
            f"data.root: no scene with a TestSplit.txt in {root}; expected {root / 'chess' / 'TestSplit.txt'} and "
            f"{root / SEVEN_SCENES_EXAMPLE}"
        )
    return [
        ViewSequence(f"{scene}/{name}", _seven_scenes_frames(root, f"{scene}/{name}"), _read_millimeters)
        for scene in scenes
        for name in _test_sequences(root / scene / "TestSplit.txt")
    ]


def open_nrgbd(root: Path) -> list[ViewSequence]:
    """Every 500th frame of each scene.

    Raises:
        ValueError: another layout, or a frame without its depth or pose.
    """
    require_folder(root, NRGBD_EXAMPLE)
    scenes = [scene for scene in subfolders(root) if (root / scene / "poses.txt").is_file()]
    if not scenes:
        raise ValueError(f"data.root: no scene in {root}; expected {root / NRGBD_EXAMPLE} and poses.txt beside images")
    return [ViewSequence(scene, _nrgbd_frames(root, scene), _read_millimeters) for scene in scenes]


def open_scannet(root: Path) -> list[ViewSequence]:
    """The first scan of each test scene: every third frame, 90 at most.

    Raises:
        ValueError: another layout, or a frame without its pose.
    """
    require_folder(root, SCANNET_EXAMPLE)
    for place in ("scans_test/", "scans/", ""):
        if scenes := [scene for scene in subfolders(root / place) if _SCANNET_TEST.fullmatch(scene)]:
            return [ViewSequence(scene, _scannet_frames(root, place + scene), _read_millimeters) for scene in scenes]
    raise ValueError(
        f"data.root: no test scene (scene0707_00 to scene0806_00) in {root}; expected {root / SCANNET_EXAMPLE}, as "
        "ScanNet's SensReader exports it"
    )


def _read_millimeters(path: Path) -> np.ndarray:
    depth = read_depth_png(path, per_meter=1000, unknown=65535)
    return np.where(depth > _MAX_DEPTH_M, np.float32(0), depth)


def _test_sequences(split: Path) -> list[str]:
    """Folders of the lines "sequence3"."""
    numbers = [re.fullmatch(r"(?:sequence|seq-?)(\d+)", words[0]) for words in read_table(split, 1)]
    if not numbers or None in numbers:
        raise ValueError(f"data.root: {split}: expected one 'sequence<number>' a line")
    return [f"seq-{int(match[1]):02d}" for match in numbers if match]


def _seven_scenes_frames(root: Path, folder: str) -> list[ViewFrame]:
    found = [_SEVEN_SCENES_FRAME.fullmatch(name) for name in files_in(root / folder, [".color.png"])]
    numbers = [int(match[1]) for match in found if match]
    if not numbers or numbers != list(range(len(numbers))):
        lacking = next((k for k, number in enumerate(numbers) if k != number), 0)
        raise ValueError(f"data.root: {root / folder} lacks frame-{lacking:06d}.color.png; unpack all of the sequence")
    frames = []
    for number in numbers[::SEVEN_SCENES_STEP]:
        stem = f"{folder}/frame-{number:06d}"
        projected = f"{stem}.depth.proj.png"
        depth = projected if (root / projected).is_file() else f"{stem}.depth.png"
        require_file(root / depth, "every frame that is shown needs its depth")
        pose = read_pose(require_file(root / f"{stem}.pose.txt", "every frame that is shown needs its pose"))
        frames.append(ViewFrame(f"{stem}.color.png", depth, _SEVEN_SCENES_CAMERA, pose))
    return frames


def _nrgbd_frames(root: Path, scene: str) -> list[ViewFrame]:
    names = files_in(root / scene / "images", [".png", ".jpg"])
    poses = read_matrix(root / scene / "poses.txt", 4 * len(names)).reshape(-1, 4, 4)
    focal_file = root / scene / "focal.txt"
    focal = float(read_matrix(focal_file, 1, 1)[0, 0]) if focal_file.is_file() else _NRGBD_FOCAL
    if not names:
        raise ValueError(f"data.root: no frame in {root / scene / 'images'}; expected img0.png …")
    frames = []
    for row in range(0, len(names), NRGBD_STEP):
        if names[row] not in (f"img{row}.png", f"img{row}.jpg"):
            raise ValueError(
                f"data.root: {root / scene / 'images'} lacks a frame before img{row}.png: got {names[row]}"
            )
        depth = f"{scene}/depth/depth{row}.png"
        require_file(root / depth, "every frame that is shown needs its depth")
        opengl = torch.from_numpy(poses[row, :3].copy())
        pose = invert_se3(from_opengl(opengl)).numpy() if bool(opengl.isfinite().all()) else None
        frames.append(ViewFrame(f"{scene}/images/{names[row]}", depth, pinhole(focal, focal, 320, 240), pose))
    return frames


def _scannet_frames(root: Path, folder: str) -> list[ViewFrame]:
    calibration = root / folder / "intrinsic" / "intrinsic_color.txt"
    intrinsics = from_calibration(read_matrix(calibration, 4)) if calibration.is_file() else None
    names = files_in(root / folder / "color", [".jpg", ".png"])[::SCANNET_STEP][:SCANNET_FRAMES]
    if len(names) < 3:
        raise ValueError(f"data.root: {root / folder / 'color'} has too few frames; expected 0.jpg, 1.jpg …")
    frames = []
    for name in names:
        path = root / folder / "pose" / f"{Path(name).stem}.txt"
        pose = read_pose(require_file(path, "every frame needs its pose"))
        frames.append(ViewFrame(f"{folder}/color/{name}", None, intrinsics, pose))
    return frames
