"""RealEstate10K (Zhou et al. 2018): lists of cameras, and frames that one has cut from the videos oneself.

test/<clip>.txt                       the video's address, then a line a frame: time stamp (microseconds),
                                      fx fy cx cy in units of the picture, 0 0, world_to_camera by rows
frames/test/<clip>/<time stamp>.png   (or .jpg; also beside the list, in test/<clip>/)
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from restrike.data.evaluation_sets.formats import numbers_of, read_table
from restrike.data.evaluation_sets.sequences import ViewFrame, ViewSequence, files_in, invert_pose, require_folder
from restrike.data.randomness import Purpose, stream

_log = logging.getLogger(__name__)
EXAMPLE = "test/000c3ab189999a83.txt"
FRAMES_EXAMPLE = "frames/test/000c3ab189999a83/52553000.png"
FRAMES, SEED = 10, 0
_WORDS = 19


def open_re10k(root: Path) -> list[ViewSequence]:
    """Ten random frames of each test clip that has so many; which ones, the clip's name and the seed 0 decide.

    Raises:
        ValueError: another layout, or a malformed list.
    """
    require_folder(root, EXAMPLE)
    lists = files_in(root / "test", [".txt"])
    if not lists:
        raise ValueError(f"data.root: no list of cameras in {root / 'test'}; expected {root / EXAMPLE}")
    found = [(Path(name).stem, _draw(root, Path(name).stem)) for name in lists]
    sequences = [ViewSequence(clip, frames) for clip, frames in found if frames]
    if not sequences:
        raise ValueError(f"data.root: no clip in {root} has {FRAMES} frames; expected {root / FRAMES_EXAMPLE}")
    if len(sequences) < len(lists):
        _log.warning("%s: %d of %d clips have the %d frames", root, len(sequences), len(lists), FRAMES)
    return sequences


def _draw(root: Path, clip: str) -> list[ViewFrame]:
    folder = next((f for f in (f"frames/test/{clip}", f"test/{clip}") if (root / f).is_dir()), None)
    if folder is None:
        return []
    files = {Path(name).stem: name for name in files_in(root / folder, [".png", ".jpg", ".jpeg"])}
    path = root / "test" / f"{clip}.txt"
    rows = [words for words in read_table(path, 1)[1:] if words[0] in files]
    if len(rows) < FRAMES:
        return []
    number = int.from_bytes(hashlib.sha256(clip.encode()).digest()[:4], "big")
    chosen = stream(SEED, Purpose.VIEWS, number).choice(len(rows), FRAMES, replace=False)
    return [_frame(root, f"{folder}/{files[rows[row][0]]}", rows[row], path) for row in chosen.tolist()]


def _frame(root: Path, image: str, words: list[str], path: Path) -> ViewFrame:
    if len(words) != _WORDS:
        raise ValueError(f"{path}: frame {words[0]}: expected {_WORDS} numbers, got {len(words)}")
    values = np.array(numbers_of(words[1:], path), dtype=np.float64)
    try:
        with Image.open(root / image) as picture:
            width, height = picture.size
    except OSError as error:
        raise ValueError(f"data.root: {root / image}: no picture ({error})") from None
    fx, fy, cx, cy = values[:4] * (width, height, width, height)
    intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])  # of a picture's size: from its corner
    return ViewFrame(image, None, intrinsics, invert_pose(values[6:].reshape(3, 4)))
