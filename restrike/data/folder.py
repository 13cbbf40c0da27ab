"""Listing image folders in torchvision's order: class index = rank of the sorted folder name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from restrike.data.index import IMAGE_EXTENSIONS

_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


class FolderListing(NamedTuple):
    """Images of a tree: class names by index, paths relative to the tree, class index of each path."""

    classes: list[str]
    paths: list[str]
    labels: list[int]


def list_image_folder(root: Path, setting: str) -> FolderListing:
    """List `root/<class>/**/image` exactly as torchvision's ImageFolder does.

    Args:
        root: the folder of one split.
        setting: the option that named it, for messages.

    Raises:
        ValueError: no such folder, no class folders, or a class without an image.
    """
    if not root.is_dir():
        raise ValueError(f"{setting}: no folder {root}; expected {root}/<class>/<image>")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        flat = sum(is_image(entry.name) for entry in os.scandir(root))
        found = f"it holds {flat} images, but outside class folders" if flat else "it is empty"
        raise ValueError(f"{setting}: {root} has no class folders: {found}; expected {root}/<class>/<image>")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = list_images(root / name)
        if not files:
            raise ValueError(
                f"{setting}: class folder {root / name} has no image ({', '.join(IMAGE_EXTENSIONS)}); "
                "remove the folder or add images"
            )
        paths += [f"{name}/{file}" for file in files]
        labels += [label] * len(files)
    return FolderListing(classes, paths, labels)


def list_images(root: Path) -> list[str]:
    """All images below a folder, relative to it, folder by folder in sorted order."""
    found: list[str] = []
    for folder, _, files in sorted(os.walk(root, followlinks=True)):
        prefix = os.path.relpath(folder, root)
        found += [file if prefix == "." else f"{prefix}/{file}" for file in sorted(files) if is_image(file)]
    return found


def is_image(name: str) -> bool:
    """By the file name's ending, any case."""
    return name.lower().endswith(_SUFFIXES)
