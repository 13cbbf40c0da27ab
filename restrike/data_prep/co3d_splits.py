"""Splits that others derived from CO3D: RayDiffusion's and VGGT's `<category>_<train|test>.jgz`, where present.

Both map a sequence to its frames in order, known by `filepath`; the two have the *same file names* and differ in their
other keys (R, T, focal_length against extri, intri). Only membership and order are taken: cameras come from the
genuine annotations, which both were computed from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from restrike.data_prep.co3d_annotations import FETCH_AGAIN, read_gzip
from restrike.data_prep.co3d_tree import Category
from restrike.data_prep.errors import PrepareError

Subsets = dict[str, list[tuple[str, int]]]


def read_derived_splits(derived: Iterable[tuple[str, Path]], category_name: str, category: Category) -> Subsets:
    """ "<source>/train" and "<source>/test" for every source that has files of this category.

    Args:
        derived: (name of the source, folder with its `.jgz` files).
        category_name: "apple".
        category: tells frames by their image path.

    Raises:
        PrepareError: a damaged file, or one that belongs to another data set; names it.
    """
    splits: Subsets = {}
    for source, folder in derived:
        for part in ("train", "test"):
            path = folder / f"{category_name}_{part}.jgz"
            if path.is_file():
                splits[f"{source}/{part}"] = _read(path, category)
    return splits


def _read(path: Path, category: Category) -> list[tuple[str, int]]:
    numbers = {
        frame.image.path: (sequence.name, frame.frame_number)
        for sequence in category.sequences.values()
        for frame in sequence.frames
    }
    try:
        table = json.loads(read_gzip(path))
        paths = [frame["filepath"] for frames in table.values() for frame in frames]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrepareError(
            f'{path}: expected {{sequence: [{{"filepath": …}}, …]}} ({type(error).__name__}: {error}); {FETCH_AGAIN}'
        ) from None
    known = [numbers[name] for name in paths if name in numbers]
    if paths and not known:
        raise PrepareError(f"{path}: none of its {len(paths)} frames (first: {paths[0]}) is in this data set")
    return known
