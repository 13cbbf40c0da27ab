"""The catalogue of a shard set: what a set holds, in one JSON file beside the shards.

It carries no time stamp: preparing the same images again gives the same bytes. Shard names are plain file names,
because a name with a scheme or a folder in it would make the list of files something that can be attacked.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from restrike.data.files import sha256_lines, write_atomically

CATALOGUE_NAME = "catalogue.json"
_FORMAT = "restrike-shards-1"


class ShardEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One shard: file name, number of samples, length in bytes, sha256 of the tar and of its index."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One split: number of samples, samples per class, shards in order."""

    samples: int
    class_counts: list[int]
    shards: list[ShardEntry]


class Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shard set.

    Attributes:
        classes: names in the order of their index (the sorted folder names).
        classes_sha256: of the names, one a line: two sets with equal hashes mean the same by class k.
        seed: of the permutation before the cut into shards.
        max_side: pixels, where larger images were shrunk and encoded again; None = original bytes (faithful).
        splits: "train" and "validation".
        checksum: sha256 of this catalogue with an empty checksum; identifies the whole set.
    """

    name: str
    seed: int
    max_side: int | None
    classes: list[str]
    classes_sha256: str
    splits: dict[str, Split]
    format: str = _FORMAT
    checksum: str = ""

    def sealed(self) -> Catalogue:
        """With `checksum` filled in."""
        blank = msgspec.structs.replace(self, checksum="")
        return msgspec.structs.replace(self, checksum=hashlib.sha256(msgspec.json.encode(blank)).hexdigest())

    def save(self, path: Path) -> None:
        write_atomically(path, msgspec.json.format(msgspec.json.encode(self.sealed()), indent=1) + b"\n")


def load_catalogue(path: Path, label: str | None = None) -> Catalogue:
    """Read and check a catalogue.

    Args:
        path: the file.
        label: what messages call it (a URL without secrets), default the path.

    Raises:
        ValueError: not a catalogue, of another version, edited, or inconsistent; says how to mend it.
    """
    label = label or str(path)
    mend = "make it again with `python -m cli prepare`"
    try:
        catalogue = msgspec.json.decode(path.read_bytes(), type=Catalogue)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{label} is not a shard catalogue ({error}); {mend}") from error
    if catalogue.format != _FORMAT:
        raise ValueError(f"{label}: format '{catalogue.format}', this code reads '{_FORMAT}'; {mend}")
    if catalogue.sealed().checksum != catalogue.checksum:
        raise ValueError(f"{label}: content does not fit its checksum (edited or damaged); {mend}")
    if sha256_lines(catalogue.classes) != catalogue.classes_sha256:
        raise ValueError(f"{label}: classes do not fit classes_sha256; {mend}")
    for split in catalogue.splits.values():
        for shard in split.shards:
            check_shard_name(shard.name, label)
        if sum(shard.samples for shard in split.shards) != split.samples:
            raise ValueError(f"{label}: samples of the shards do not sum to {split.samples}; {mend}")
    return catalogue


def check_shard_name(name: str, label: str) -> None:
    """Raises: ValueError unless `name` is a plain file name that ends in .tar."""
    if "/" in name or "\\" in name or ":" in name or name.startswith((".", "-")) or not name.endswith(".tar"):
        raise ValueError(f"{label}: shard name '{name}' is not a plain *.tar file name; refused")
