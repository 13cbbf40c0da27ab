"""MPI Sintel (Butler et al. 2012), pass "final", with the depth and camera extension.

training/final/<sequence>/frame_0001.png
training/depth/<sequence>/frame_0001.dpt
training/camdata_left/<sequence>/frame_0001.cam
"""

from __future__ import annotations

from pathlib import Path

from restrike.data.evaluation_sets.formats import read_sintel_camera, read_sintel_depth
from restrike.data.evaluation_sets.sequences import (
    ViewFrame,
    ViewSequence,
    choose,
    files_in,
    invert_pose,
    require_file,
    require_folder,
    subfolders,
)

EXAMPLE = "training/final/alley_2/frame_0001.png"
SEQUENCES = (
    "alley_2", "ambush_4", "ambush_5", "ambush_6", "cave_2", "cave_4", "market_2", "market_5", "market_6", "shaman_3",
    "sleeping_1", "sleeping_2", "temple_2", "temple_3",
)  # fmt: skip


def open_sintel(root: Path, has_depth: bool, has_poses: bool) -> list[ViewSequence]:
    """The fourteen sequences, with what is asked for.

    Raises:
        ValueError: another layout, or a frame without its depth or camera.
    """
    require_folder(root, EXAMPLE)
    base = root / "training"
    names = choose(subfolders(base / "final"), SEQUENCES, root, EXAMPLE)
    return [ViewSequence(name, _frames(root, name, has_depth, has_poses), read_sintel_depth) for name in names]


def _frames(root: Path, name: str, has_depth: bool, has_poses: bool) -> list[ViewFrame]:
    frames = []
    for file in files_in(root / "training" / "final" / name, [".png"]):
        stem = Path(file).stem
        depth = f"training/depth/{name}/{stem}.dpt" if has_depth else None
        if depth is not None:
            require_file(root / depth, f"every frame of {name} needs its depth")
        intrinsics = pose = None
        if has_poses:
            path = require_file(
                root / "training" / "camdata_left" / name / f"{stem}.cam", f"every frame of {name} needs its camera"
            )
            intrinsics, world_to_camera = read_sintel_camera(path)  # the principal point is the middle from the corner
            pose = invert_pose(world_to_camera)
        frames.append(ViewFrame(f"training/final/{name}/{file}", depth, intrinsics, pose))
    if not frames:
        raise ValueError(f"data.root: no frame in {root / 'training' / 'final' / name}; expected frame_0001.png …")
    return frames
