"""NYU-v2 (Silberman et al. 2012): the 654 test pictures of the official split, in the folder form of the depth
literature (the labelled .mat file written out).

    official_splits/test/<scene>/rgb_00045.jpg
    official_splits/test/<scene>/sync_depth_00045.png     16 bits, millimetres
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from restrike.data.evaluation_sets.formats import read_depth_png
from restrike.data.evaluation_sets.sequences import (
    ViewFrame,
    ViewSequence,
    files_in,
    pinhole,
    require_file,
    require_folder,
    subfolders,
)

EXAMPLE = "official_splits/test/bathroom/rgb_00045.jpg"
IMAGES = 654
_PER_METER = 1000
_CAMERA = pinhole(518.85790117, 519.46961112, 325.58244941, 253.73616633)  # the toolbox's colour camera


def open_nyu(root: Path) -> list[ViewSequence]:
    """All test pictures, as one sequence.

    Raises:
        ValueError: another layout, or a picture without its depth.
    """
    require_folder(root, EXAMPLE)
    places = ("official_splits/test", "test", ".")
    frames: list[ViewFrame] = []
    for place in places:
        for scene in subfolders(root / place):
            folder = scene if place == "." else f"{place}/{scene}"
            frames += [_frame(root, folder, name) for name in _pictures(root / folder)]
        if frames:
            return [ViewSequence("test", frames, partial(read_depth_png, per_meter=_PER_METER))]
    raise ValueError(f"data.root: no picture in {root}; expected {root / EXAMPLE} and sync_depth_00045.png beside it")


def _pictures(folder: Path) -> list[str]:
    return [name for name in files_in(folder, [".jpg", ".png"]) if name.startswith("rgb_")]


def _frame(root: Path, folder: str, name: str) -> ViewFrame:
    depth = f"{folder}/sync_depth_{Path(name).stem.removeprefix('rgb_')}.png"
    require_file(root / depth, f"{folder}/{name} needs its depth")
    return ViewFrame(f"{folder}/{name}", depth, _CAMERA)
