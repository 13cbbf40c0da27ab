"""ImageNet (or any set) from the usual tree `train/<class>/<image>`, `val/<class>/<image>` to shards."""

from __future__ import annotations

from pathlib import Path

from restrike.data.catalogue import Catalogue
from restrike.data.folder import FolderListing, list_image_folder
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.pack import PackOptions, SourceSplit, pack


def prepare_imagenet(src: Path, out: Path, options: PackOptions) -> Catalogue:
    """Pack `src/train` and `src/val` into `out`. Class index = rank of the class folder's name, as in torchvision.

    Raises:
        PrepareError: bad folders (each named), or whatever `pack` meets.
    """
    _check_folders(src, out)
    try:
        train = list_image_folder(src / "train", "--src")
        val = list_image_folder(src / "val", "--src")
    except ValueError as error:
        raise PrepareError(str(error)) from error
    _check_classes(train, val)
    return pack({"train": SourceSplit(src / "train", train), "validation": SourceSplit(src / "val", val)}, out, options)


def _check_folders(src: Path, out: Path) -> None:
    if not src.is_dir():
        raise PrepareError(f"--src: no folder {src}; expected one with train/<class>/<image> and val/<class>/<image>")
    if out.exists() and not out.is_dir():
        raise PrepareError(f"--out: {out} is a file; name a folder")
    for split in ("train", "val"):
        if not (src / split).is_dir():
            held = ", ".join(sorted(path.name for path in src.iterdir())[:5]) or "nothing"
            raise PrepareError(f"--src: {src} has no folder '{split}' (it holds {held})")
        if out.resolve().is_relative_to((src / split).resolve()) or out.resolve() == src.resolve():
            raise PrepareError(f"--out: {out} lies in the images' own folder; choose one outside {src}")


def _check_classes(train: FolderListing, val: FolderListing) -> None:
    """A class more or less in one split would shift the indices of all that follow."""
    for name, other, where in ((val, train, "val"), (train, val, "train")):
        if extra := sorted(set(name.classes) - set(other.classes)):
            raise PrepareError(
                f"--src: class folders that only {where}/ has: {', '.join(extra[:5])} ({len(extra)} in all); "
                f"class indices are ranks of sorted names, so train/ ({len(train.classes)} classes) and val/ "
                f"({len(val.classes)}) must have the same"
            )
