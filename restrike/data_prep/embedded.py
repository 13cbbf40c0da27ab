"""The two image sets that ship with the library, written as folder trees and packed like any other set.

Digits: real handwriting (UCI optical digits, CC BY 4.0), 8 x 8 grey, for a quickstart that reaches a high accuracy in
minutes. Photos: crops of sixteen photographs (CC0, public domain, two CC BY 2.0), where the class is the photograph;
small, but RGB JPEGs of several sizes through the whole augmentation. Licences lie beside the files in `assets/`.
"""

from __future__ import annotations

import io
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
from PIL import Image

from restrike.data.catalogue import Catalogue
from restrike.data.randomness import Purpose, stream
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.imagenet import prepare_imagenet
from restrike.data_prep.pack import PackOptions

TREE = "images"  # the folder tree inside the output folder
DIGITS_TRAIN = 1437  # of 1797: the last 360 were written by other people
PHOTO_TRAIN_SHARE, PHOTO_VAL_SHARE = 0.68, 0.28  # of a photo's width, from the left and from the right
_PHOTO_SEED = 20


def prepare_digits(out: Path, options: PackOptions) -> Catalogue:
    """1,437 training and 360 validation images of 10 classes, as lossless PNGs of 8 x 8 pixels."""
    with resources.as_file(_assets() / "digits_8x8.npz") as path, np.load(path, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    tree: dict[str, bytes] = {}
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = "train" if number < DIGITS_TRAIN else "val"
        tree[f"{split}/{label}/{number:04d}.png"] = _encode(Image.fromarray(image), "PNG")
    return _pack_tree(tree, "LICENSE-digits.txt", out, options)


def prepare_photos(out: Path, options: PackOptions, train_per_class: int = 100, val_per_class: int = 25) -> Catalogue:
    """Square JPEG crops; those for training and validation come from areas of a photo that do not touch."""
    if min(train_per_class, val_per_class) < 1:
        raise PrepareError("--train-per-class, --val-per-class: at least 1 each")
    tree: dict[str, bytes] = {}
    for number, name in enumerate(photo_names()):
        photo = Image.open(io.BytesIO((_assets() / "photos" / f"{name}.jpg").read_bytes()))
        for split, count in (("train", train_per_class), ("val", val_per_class)):
            for crop in range(count):
                box = crop_box(photo.size, split, number, crop)
                tree[f"{split}/{name}/{name}_{crop:04d}.jpg"] = _encode(photo.crop(box), "JPEG", quality=92)
    return _pack_tree(tree, "LICENSE-photos.txt", out, options)


def photo_names() -> list[str]:
    """The classes of the photo set."""
    return sorted(entry.name.removesuffix(".jpg") for entry in (_assets() / "photos").iterdir())


def crop_box(size: tuple[int, int], split: str, photo: int, crop: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a square crop in the split's part of a photo of (width, height)."""
    width, height = size
    random = stream(_PHOTO_SEED, Purpose.PACKING, photo, int(split == "val"), crop)
    largest = min(int(PHOTO_VAL_SHARE * width), height)
    side = int(random.integers(largest // 2, largest + 1))
    first, last = (
        (0, int(PHOTO_TRAIN_SHARE * width)) if split == "train" else (width - int(PHOTO_VAL_SHARE * width), width)
    )
    left = int(random.integers(first, last - side + 1))
    top = int(random.integers(0, height - side + 1))
    return left, top, left + side, top + side


def _pack_tree(tree: dict[str, bytes], licence: str, out: Path, options: PackOptions) -> Catalogue:
    present = {str(path.relative_to(out / TREE)) for path in (out / TREE).rglob("*.*") if path.is_file()}
    if others := sorted(present - set(tree) - {licence}):
        raise PrepareError(f"--out: {out / TREE} holds files of another set ({others[0]}); choose an empty folder")
    try:
        for name, data in {**tree, licence: (_assets() / licence).read_bytes()}.items():
            path = out / TREE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != data:  # untouched files keep their times: nothing to redo
                path.write_bytes(data)
    except OSError as error:
        raise PrepareError(f"--out: cannot write {out / TREE}: {error.strerror}") from error
    return prepare_imagenet(out / TREE, out, options)


def _encode(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _assets() -> Traversable:
    return resources.files("restrike.data_prep") / "assets"
