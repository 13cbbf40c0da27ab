"""KITTI's depth benchmark (Uhrig et al. 2017), as videos and as its selected pictures.

val/<drive>/proj_depth/groundtruth/image_02/<frame>.png     the annotated depth archive, with the pictures of the
<date>/<drive>/image_02/data/<frame>.png                    raw data (also below raw/, or below val/<drive>/)

depth_selection/val_selection_cropped/{image, groundtruth_depth, intrinsics}    (or its parts as the root)
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from restrike.data.evaluation_sets.formats import read_depth_png, read_matrix
from restrike.data.evaluation_sets.sequences import (
    ViewFrame,
    ViewSequence,
    files_in,
    from_calibration,
    require_file,
    require_folder,
    subfolders,
)

VIDEO_EXAMPLE = "val/2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000005.png"
SELECTION_EXAMPLE = (
    "depth_selection/val_selection_cropped/image/2011_09_26_drive_0002_sync_image_0000000005_image_02.png"
)
VIDEO_DRIVES, VIDEO_FRAMES = 13, 110
SELECTION_IMAGES = 1000
_TRUTH = "proj_depth/groundtruth/image_02"
_PER_METER = 256
_DATE = len("2011_09_26")
_read_depth = partial(read_depth_png, per_meter=_PER_METER)


def open_kitti_videos(root: Path) -> list[ViewSequence]:
    """The first 110 annotated frames (or all of a shorter drive) of the left colour camera of each validation drive.

    Raises:
        ValueError: another layout, or a frame without its picture.
    """
    require_folder(root, VIDEO_EXAMPLE)
    base = root / "val" if (root / "val").is_dir() else root
    drives = [name for name in subfolders(base) if (base / name / _TRUTH).is_dir()]
    if not drives:
        raise ValueError(f"data.root: no annotated drive in {root}; expected {root / VIDEO_EXAMPLE}")
    return [ViewSequence(name, _video_frames(root, base, name), _read_depth) for name in drives]


def open_kitti_selection(root: Path) -> list[ViewSequence]:
    """The 1000 pictures of "val_selection_cropped", as one sequence.

    Raises:
        ValueError: another layout, or a picture without its depth.
    """
    require_folder(root, SELECTION_EXAMPLE)
    places = [root / "depth_selection" / "val_selection_cropped", root / "val_selection_cropped", root]
    base = next((place for place in places if (place / "image").is_dir()), None)
    names = files_in(base / "image", [".png"]) if base else []
    if base is None or not names:
        raise ValueError(f"data.root: no selected picture in {root}; expected {root / SELECTION_EXAMPLE}")
    prefix = base.relative_to(root).as_posix()
    prefix = "" if prefix == "." else f"{prefix}/"
    return [ViewSequence("val_selection_cropped", [_selected(root, prefix, name) for name in names], _read_depth)]


def _video_frames(root: Path, base: Path, drive: str) -> list[ViewFrame]:
    names = files_in(base / drive / _TRUTH, [".png"])[:VIDEO_FRAMES]
    places = [root / drive[:_DATE] / drive, root / "raw" / drive[:_DATE] / drive, base / drive]
    folder = next((place / "image_02" / "data" for place in places if (place / "image_02" / "data").is_dir()), None)
    if not names or folder is None:
        missing = base / drive / _TRUTH if not names else places[0] / "image_02" / "data"
        raise ValueError(f"data.root: {drive} has no frame in {missing}: take the drive's part of KITTI's raw data")
    truth, pictures = ((x.relative_to(root).as_posix()) for x in (base / drive / _TRUTH, folder))
    for name in names:
        require_file(folder / name, f"{_TRUTH} of {drive} annotates it")
    return [ViewFrame(f"{pictures}/{name}", f"{truth}/{name}") for name in names]


def _selected(root: Path, prefix: str, name: str) -> ViewFrame:
    depth = f"{prefix}groundtruth_depth/{name.replace('_sync_image_', '_sync_groundtruth_depth_', 1)}"
    require_file(root / depth, f"{prefix}image/{name} needs its depth")
    calibration = root / f"{prefix}intrinsics/{Path(name).stem}.txt"
    intrinsics = from_calibration(read_matrix(calibration, 3, 3)) if calibration.is_file() else None
    return ViewFrame(f"{prefix}image/{name}", depth, intrinsics)
