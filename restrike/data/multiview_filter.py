"""Which sequences and frames of a multi-view set a family uses: everything that the packing left open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from restrike.data.multiview_index import SceneIndex

UNSEEN = ("ball", "book", "couch", "frisbee", "hotdog", "kite", "remote", "sandwich", "skateboard", "suitcase")
SEEN = (
    "apple", "backpack", "banana", "baseballbat", "baseballglove", "bench", "bicycle", "bottle", "bowl",
    "broccoli", "cake", "car", "carrot", "cellphone", "chair", "cup", "donut", "hairdryer", "handbag",
    "hydrant", "keyboard", "laptop", "microwave", "motorcycle", "mouse", "orange", "parkingmeter", "pizza",
    "plant", "stopsign", "teddybear", "toaster", "toilet", "toybus", "toyplane", "toytrain", "toytruck", "tv",
    "umbrella", "vase", "wineglass",
)  # fmt: skip
# DiffusionSfM's release prints these and, whatever its name for the list says, trains on them.
BAD_DEPTH = (
    "411_55952_107659", "427_59915_115716", "435_61970_121848", "112_13265_22828", "110_13069_25642",
    "165_18080_34378", "368_39891_78502", "391_47029_93665", "20_695_1450", "135_15556_31096", "417_57572_110680",
)  # fmt: skip
_GROUPS = {"seen": SEEN, "unseen": UNSEEN}


@dataclass(frozen=True)
class SceneFilter:
    """Which sequences and frames of a set to use.

    Attributes:
        categories: "seen", "unseen" (RayDiffusion's split), or names; () = all.
        subsets: set lists as "<subset>/<part>", such as "fewview_dev/train" or "vggt/train"; a frame has to be in one
            of them; () = all frames.
        min_quality: viewpoint quality above this (0.5 everywhere but VGGT); None = any. Unknown quality fails.
        min_frames: usable frames at least.
        exclude: sequences by name.
        exclude_bad_depth: DiffusionSfM's eleven.
        max_translation: drop a sequence with a camera translation of a larger absolute value.
        whole_cameras: drop a sequence that lost a frame to a bad camera.
        require_foreground: leave out frames with an empty mask (RayDiffusion).
        require_depth: leave out frames without any depth.
        max_per_category: draw so many sequences of each (CUT3R: 50, seed 42 + the category's number); None = all.
        require_cameras: refuse a set with photos whose cameras nobody knows, which serve prediction only.
    """

    categories: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ()
    min_quality: float | None = 0.5
    min_frames: int = 1
    exclude: tuple[str, ...] = ()
    exclude_bad_depth: bool = False
    max_translation: float = 1e5
    whole_cameras: bool = True
    require_foreground: bool = False
    require_depth: bool = True
    max_per_category: int | None = None
    require_cameras: bool = True


def check_filter(indices: Sequence[SceneIndex], filter: SceneFilter) -> None:
    """A name that the whole set does not know is a mistake, and not an empty choice.

    Raises:
        ValueError: names what there is.
    """
    known = {bytes(name).decode() for index in indices for name in index.subset_names}
    if unknown := [name for name in filter.subsets if name not in known]:
        raise ValueError(
            f"data filter: the set has no subset '{unknown[0]}'; it has {', '.join(sorted(known)) or 'none'}"
        )
    present = {bytes(name).decode() for index in indices for name in index.categories}
    names = [name for name in filter.categories if name not in _GROUPS]
    if unknown := [name for name in names if name not in present]:
        raise ValueError(f"data filter: the set has no category '{unknown[0]}'; it has {', '.join(sorted(present))}")
    if filter.require_cameras:
        for index in indices:
            _refuse_unknown_cameras(index, filter)


def _refuse_unknown_cameras(index: SceneIndex, filter: SceneFilter) -> None:
    wanted = {name for entry in filter.categories for name in _GROUPS.get(entry, (entry,))}
    is_unknown = np.isnan(index.world_to_camera[:, 0, 0])
    for number, (category, sequence) in enumerate(zip(index.categories, index.sequences, strict=True)):
        rows = slice(index.first[number], index.first[number + 1])
        is_chosen = not wanted or category.decode() in wanted
        if is_unknown[rows].any() and is_chosen and sequence.decode() not in filter.exclude:
            raise ValueError(
                f"data filter: scene '{sequence.decode()}' was packed from photos without cameras, which serve "
                "prediction only; find its cameras (COLMAP) and prepare it again, or leave it out with filter.exclude"
            )


def usable_frames(index: SceneIndex, filter: SceneFilter) -> np.ndarray:
    """bool [m]: frames that a filter leaves, of any sequence."""
    keep = np.ones(len(index.numbers), dtype=bool)
    if filter.subsets:
        names = [bytes(name).decode() for name in index.subset_names]
        rows = [names.index(name) for name in filter.subsets if name in names]
        keep &= (index.subset_positions[rows] >= 0).any(0)
    if filter.require_foreground:
        keep &= index.boxes[:, 2] > index.boxes[:, 0]
    if filter.require_depth:
        keep &= index.has_depth
    return keep


def is_wanted(index: SceneIndex, number: int, filter: SceneFilter) -> bool:
    """Whether a sequence passes by its category, name, quality and cameras."""
    category, sequence = bytes(index.categories[number]).decode(), bytes(index.sequences[number]).decode()
    wanted = {name for entry in filter.categories for name in _GROUPS.get(entry, (entry,))}
    quality = float(index.quality[number])
    if wanted and category not in wanted:
        return False
    if sequence in filter.exclude or (filter.exclude_bad_depth and sequence in BAD_DEPTH):
        return False
    if filter.min_quality is not None and (math.isnan(quality) or quality <= filter.min_quality):
        return False
    if filter.whole_cameras and index.bad_cameras[number]:
        return False
    rows = slice(index.first[number], index.first[number + 1])
    translations = np.nan_to_num(index.world_to_camera[rows, :, 3])  # unknown cameras are none of this filter's
    return bool(np.abs(translations).max(initial=0) <= filter.max_translation)
