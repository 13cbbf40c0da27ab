"""ImageNet's validation set and the test sets made for its 1000 classes: where labels come from, what is evaluated.

Class index = rank of the WordNet id among ImageNet-1k's 1000. Label maps are facts that timm ships; they are read from
its data files without importing it.

Traps that this file is about: -V2's folders are class numbers, whose sorted names are not sorted numbers (0, 1, 10,
100 …); -R and -A hold 200 classes each, and a model answers among those 200, not among 1000; ReaL gives an image
several right classes or none, in which case it does not count.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from restrike.data.files import sha256_lines
from restrike.data.folder import list_image_folder, list_images

NUM_CLASSES = 1000
ProtocolName = Literal["imagenet", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "imagenet-real"]
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+$", re.IGNORECASE)


@dataclass(frozen=True)
class Protocol:
    """How a set is evaluated.

    Attributes:
        title: name and paper.
        num_images: of the whole set, those that count.
        folders: what class folders are called: WordNet ids, or class numbers; None where file names tell.
        subset: timm's list of the WordNet ids that a model answers among; None for all 1000.
        example: of a file's place in the genuine layout, for messages.
    """

    title: str
    num_images: int
    folders: Literal["synset", "number"] | None
    subset: str | None
    example: str


PROTOCOLS: dict[str, Protocol] = {
    "imagenet": Protocol(
        "ImageNet validation (arXiv 1409.0575)", 50_000, "synset", None, "n01440764/ILSVRC2012_val_00000293.JPEG"
    ),
    "imagenet-v2": Protocol(
        "ImageNet-V2 (arXiv 1902.10811), whichever of its three sets is given", 10_000, "number", None, "0/<hash>.jpeg"
    ),
    "imagenet-r": Protocol(
        "ImageNet-R (arXiv 2006.16241), among its 200 classes", 30_000, "synset", "imagenet_r", "n01443537/art_0.jpg"
    ),
    "imagenet-a": Protocol(
        "ImageNet-A (arXiv 1907.07174), among its 200 classes", 7_500, "synset", "imagenet_a", "n01498041/0.0001_….jpg"
    ),
    "imagenet-sketch": Protocol(
        "ImageNet-Sketch (arXiv 1905.13549)", 50_889, "synset", None, "n01440764/sketch_0.JPEG"
    ),
    "imagenet-real": Protocol(
        "ImageNet ReaL (arXiv 2006.07159): any of an image's labels is right, images without one do not count",
        46_837, None, None, "ILSVRC2012_val_00000293.JPEG, in class folders or without",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class EvaluationSet:
    """The images of one protocol in one folder.

    Attributes:
        paths: relative to the folder, in order.
        targets: class index of each image; where `label_sets` is given, the row of that.
        classes: class indices that count as answers; None = all 1000.
        label_sets: right class indices of each validation image of ImageNet, for ReaL.
        sha256: of the sorted names of the images (`<class folder>/<file>`; the file alone for ReaL), one a line: two
            numbers with equal hashes are about the same list of files.
    """

    protocol: Protocol
    paths: list[str]
    targets: list[int]
    classes: list[int] | None
    label_sets: list[list[int]] | None
    sha256: str

    @property
    def is_whole(self) -> bool:
        """Whether it has as many images as the published set."""
        return len(self.paths) == self.protocol.num_images

    @property
    def description(self) -> str:
        """Protocol, number of images and hash, for beside a number."""
        count = f"{len(self.paths):,} images" if self.is_whole else (
            f"INCOMPLETE: {len(self.paths):,} of {self.protocol.num_images:,} images"
        )  # fmt: skip
        return f"{self.protocol.title}; {count}; file list sha256 {self.sha256[:16]}"


def open_evaluation_set(name: ProtocolName, root: Path) -> EvaluationSet:
    """List the images of a protocol.

    Args:
        root: the folder of the class folders, as the set's own archive unpacks.

    Raises:
        ValueError: no such folder, or another layout than the set's; says which was expected.
    """
    protocol = PROTOCOLS[name]
    if protocol.folders is None:
        return _open_real(protocol, root)
    listing = list_image_folder(root, "data.images")
    allowed = synsets(protocol.subset) if protocol.subset else synsets()
    index_of = (
        {name: synsets().index(name) for name in allowed}
        if protocol.folders == "synset"
        else {str(number): number for number in range(NUM_CLASSES)}
    )
    if unknown := [folder for folder in listing.classes if folder not in index_of]:
        kind = "WordNet id of the set" if protocol.folders == "synset" else f"class number 0 to {NUM_CLASSES - 1}"
        raise ValueError(
            f"data.images: {root} is not {protocol.title}: folder '{unknown[0]}' ({len(unknown)} such) is no {kind}; "
            f"expected {root}/{protocol.example}"
        )
    targets = [index_of[listing.classes[label]] for label in listing.labels]
    classes = [synsets().index(synset) for synset in allowed] if protocol.subset else None
    return EvaluationSet(protocol, listing.paths, targets, classes, None, sha256_lines(sorted(listing.paths)))


def _open_real(protocol: Protocol, root: Path) -> EvaluationSet:
    if not root.is_dir():
        raise ValueError(f"data.images: no folder {root}; expected {root}/{protocol.example}")
    label_sets = real_labels()
    paths, targets = [], []
    for path in list_images(root):
        number = _VALIDATION_NAME.search(path)
        if number is None or not 1 <= int(number[1]) <= len(label_sets):
            raise ValueError(
                f"data.images: {root / path} is no validation image of ImageNet; expected {root}/{protocol.example}"
            )
        if label_sets[int(number[1]) - 1]:
            paths.append(path)
            targets.append(int(number[1]) - 1)
    if not paths:
        raise ValueError(f"data.images: no labelled image in {root}; expected {root}/{protocol.example}")
    names = sorted(path.rpartition("/")[2] for path in paths)
    return EvaluationSet(protocol, paths, targets, None, label_sets, sha256_lines(names))


@cache
def synsets(subset: str = "imagenet") -> list[str]:
    """WordNet ids of ImageNet-1k's classes by index, or of "imagenet_r" or "imagenet_a" in the same order."""
    return _read(f"{subset}_synsets.txt").split()


@cache
def real_labels() -> list[list[int]]:
    """ReaL's class indices of each validation image, in the order of the file numbers 1 to 50,000."""
    return json.loads(_read("imagenet_real_labels.json"))


def _read(name: str) -> str:
    spec = importlib.util.find_spec("timm")
    assert spec is not None and spec.origin is not None, "timm is a dependency"
    file = Path(spec.origin).parent / "data" / "_info" / name
    if not file.is_file():
        raise ValueError(f"this timm has no {name}, which holds the label map; install timm 1.0.22 to 1.0.31")
    return file.read_text(encoding="utf-8")
