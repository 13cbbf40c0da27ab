"""Opening a classification set, whatever form it has: prepared shards, foreign shards, or a folder tree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from restrike.data.cache import ShardCache
from restrike.data.catalogue import CATALOGUE_NAME
from restrike.data.folder import list_image_folder
from restrike.data.opener import local_path, redact, scheme
from restrike.data.shards import ShardFile, load_indices, read_catalogue, shards_of_pattern, shards_of_split
from restrike.data.source import FolderSource, ImageSource, ShardSource

Format = Literal["auto", "shards", "folder"]
_FOLDER_NAMES = {"validation": "val"}
_FOREIGN_PATTERNS = {"train": "*train*.tar", "validation": "*val*.tar", "test": "*test*.tar"}


@dataclass(frozen=True)
class DatasetLocation:
    """Where a set is and how to read it.

    Attributes:
        data: folder or URL.
        format: "auto" looks: a catalogue or tars make it shards, class folders below `train/` a folder tree.
        num_classes: what the model expects; the data must have as many.
        patterns: shard names per split, for sets without a catalogue.
        window_shards: see `ShardSource`.
    """

    data: str
    format: Format
    num_classes: int
    patterns: dict[str, str]
    window_shards: int = 8


def open_split(location: DatasetLocation, split: str, cache: ShardCache) -> ImageSource:
    """Open "train", "validation" or another split of a set.

    Raises:
        ValueError: no set there, an unfinished one, other classes than expected, missing or damaged shards. One
            message that names the option and says what to do.
    """
    try:
        form = _form(location)
        source = _open_folder(location, split) if form == "folder" else _open_shards(location, split, cache)
    except OSError as error:  # not reachable, no permission, no space for the cache
        raise ValueError(f"data.data: {error}") from error
    found = len(source.class_names)
    if found != location.num_classes:
        raise ValueError(
            f"data.num_classes is {location.num_classes}, but {redact(location.data)} has {found} classes; "
            f"set data.num_classes={found}"
        )
    return source


def _form(location: DatasetLocation) -> Format:
    data = location.data
    if location.format != "auto" or scheme(data) != "file" or location.patterns:
        return "folder" if location.format == "folder" else "shards"
    root = local_path(data)
    if (root / CATALOGUE_NAME).is_file() or (root / ".prepare").is_dir() or any(root.glob("*.tar")):
        return "shards"
    if (root / "train").is_dir() or (root / "val").is_dir():
        return "folder"
    found = "it holds neither shards nor train/" if root.exists() else "no such folder"
    raise ValueError(
        f"data.data: no images at '{data}' ({found}). "
        f"Make shards of an ImageNet tree with `python -m cli prepare imagenet --src DIR --out {data}`, or of the set "
        f"that ships with Restrike with `python -m cli prepare digits --out {data}`"
    )


def _open_folder(location: DatasetLocation, split: str) -> FolderSource:
    root = local_path(location.data) / _FOLDER_NAMES.get(split, split)
    listing = list_image_folder(root, "data.data")
    return FolderSource(root, listing.paths, listing.labels, listing.classes)


def _open_shards(location: DatasetLocation, split: str, cache: ShardCache) -> ShardSource:
    data = location.data
    catalogue = None if split in location.patterns else read_catalogue(data, cache)
    if catalogue is not None:
        files, names = shards_of_split(data, catalogue, split), catalogue.classes
    else:
        files, names = _foreign_shards(location, split), [str(label) for label in range(location.num_classes)]
    return ShardSource(files, load_indices(files, cache), names, cache, location.window_shards)


def _foreign_shards(location: DatasetLocation, split: str) -> list[ShardFile]:
    """A set without a catalogue, such as a public one: by its file names; classes are numbers."""
    data = location.data
    if split not in location.patterns and scheme(data) == "file" and (Path(local_path(data)) / ".prepare").is_dir():
        raise ValueError(
            f"data.data: the preparation of {data} has not finished; run its `python -m cli prepare` command again"
        )
    pattern = location.patterns.get(split) or _FOREIGN_PATTERNS.get(split, f"*{split}*.tar")
    return shards_of_pattern(data, pattern, f"data.{split.replace('validation', 'val')}_shards")
