"""The sidecar index of one shard: where each sample's image lies, its key and its label.

Layout of a sample in the tar, as in the public timm shard sets: adjacent members `<key>.cls` (ASCII class index),
`<key>.jpg` (or png, ...) and optionally `<key>.json`, where the key ends at the first dot of the file name. The
index is an uncompressed `.npz` without pickles, a few dozen bytes a sample; CRCs cover whole samples, headers
included, so that a flipped byte can be named.
"""

from __future__ import annotations

import ast
import functools
import io
import json
import math
import mmap
import struct
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from restrike.data.files import write_atomically
from restrike.data.tar import TarError, TarMember, iter_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp")  # as torchvision's ImageFolder
INDEX_SUFFIX = ".idx"
UNKNOWN_LABEL = -1


@dataclass(frozen=True)
class SavedIndex:
    """Arrays about one shard that are saved as an `.npz` without pickles; a subclass names them as its fields."""

    tar_bytes: int

    kind: ClassVar[str]  # what messages call the file
    version: ClassVar[int]

    def to_bytes(self) -> bytes:
        """The same content gives the same bytes."""
        buffer = io.BytesIO()
        values: dict[str, Any] = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        np.savez(buffer, **{"version": np.int64(self.version), **values})
        return buffer.getvalue()

    def save(self, path: Path) -> None:
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an index.

        Raises:
            ValueError: the file is not a whole index of this version.
        """
        data = path.read_bytes()
        try:
            arrays = _stored_arrays(data)
            version = int(arrays["version"])
            values: dict[str, Any] = {f.name: arrays[f.name] for f in fields(cls)}
        except Exception as error:  # zipfile, zlib and numpy raise a dozen types for damaged bytes
            raise ValueError(f"{cls.kind} {path} is damaged ({error}); delete it and prepare or index again") from error
        if version != cls.version:
            raise ValueError(f"{cls.kind} {path} has version {version}, this code reads {cls.version}; prepare again")
        values["tar_bytes"] = int(values["tar_bytes"])
        return cls(**values)


def _stored_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed `.npz`, as `np.load` gives them, in a fifth of the time: a set has a thousand
    indices, and `np.load` parses the headers of each, which are all alike.

    Raises:
        ValueError, KeyError, struct.error: damaged, each array's CRC included.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
    arrays = {}
    for member in members:
        name_length, extra_length = struct.unpack_from("<HH", data, member.header_offset + 26)
        begin = member.header_offset + 30 + name_length + extra_length
        content = memoryview(data)[begin : begin + member.file_size]
        if member.compress_type != zipfile.ZIP_STORED or zlib.crc32(content) != member.CRC:
            raise ValueError(f"bad CRC-32 for file {member.filename!r}")
        if bytes(content[:8]) != b"\x93NUMPY\x01\x00":
            raise ValueError(f"{member.filename!r} is no array")
        end = 10 + int.from_bytes(content[8:10], "little")
        dtype, shape = _array_header(bytes(content[10:end]))
        array = np.frombuffer(content, dtype, math.prod(shape), end).reshape(shape)
        arrays[member.filename.removesuffix(".npy")] = array.copy()  # a view would keep all of the file in memory
    return arrays


@functools.lru_cache(maxsize=4096)
def _array_header(text: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    header = ast.literal_eval(text.decode("latin1"))
    dtype = np.dtype(header["descr"])
    if dtype.hasobject or header["fortran_order"]:
        raise ValueError(f"an array of objects, or in Fortran order: {header}")
    return dtype, header["shape"]


@dataclass(frozen=True)
class ShardIndex(SavedIndex):
    """Arrays over the n samples of one shard, in file order.

    Attributes:
        keys: bytes [n], UTF-8.
        labels: int32 [n], as written in the shard, not checked against a class list; -1 where none is written.
        offsets, sizes: int64 [n], the image's content in bytes of the tar.
        starts: int64 [n + 1], first byte of each sample's first header; the last entry is the end of the last sample.
        crc32: uint32 [n], of bytes starts[i]:starts[i + 1].
        tar_bytes: length of the whole tar.
    """

    keys: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    crc32: np.ndarray

    kind = "shard index"
    version = 1

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sample: int) -> str:
        return bytes(self.keys[sample]).decode("utf-8", "surrogateescape")


def index_path(shard: Path) -> Path:
    """`x-0000.tar` → `x-0000.idx`."""
    return shard.with_suffix(INDEX_SUFFIX)


def build_index(shard: Path) -> ShardIndex:
    """Read a shard's headers and labels.

    Raises:
        TarError: damaged or truncated tar, refused member, a sample without image or with an unreadable label, or a
            key that appears twice.
    """
    if shard.stat().st_size == 0:
        raise TarError(f"{shard}: empty file; fetch or make this shard again")
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        samples = _group(list(iter_members(data, str(shard))), str(shard))
        images = [_image(key, members, shard) for key, members in samples]
        labels = [_label(key, members, data, shard) for key, members in samples]
        ends = [-(-(members[-1].offset + members[-1].size) // 512) * 512 for _, members in samples]
        starts = [members[0].start for _, members in samples]
        checks = [zlib.crc32(data[start:end]) for start, end in zip(starts, ends, strict=True)]
        size = len(data)
    return ShardIndex(
        keys=np.array([key.encode("utf-8", "surrogateescape") for key, _ in samples], dtype=np.bytes_),
        labels=np.array(labels, dtype=np.int32),
        offsets=np.array([image.offset for image in images], dtype=np.int64),
        sizes=np.array([image.size for image in images], dtype=np.int64),
        starts=np.array([*starts, ends[-1]], dtype=np.int64),
        crc32=np.array(checks, dtype=np.uint32),
        tar_bytes=size,
    )


def split_key(name: str) -> tuple[str, str]:
    """`a/b.c.jpg` → (`a/b`, `c.jpg`): a key ends at the first dot of the file name, as in webdataset."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension


def _group(members: list[TarMember], label: str) -> list[tuple[str, list[TarMember]]]:
    samples: list[tuple[str, list[TarMember]]] = []
    for member in members:
        key, _ = split_key(member.name)
        if not samples or samples[-1][0] != key:
            samples.append((key, []))
        samples[-1][1].append(member)
    if not samples:
        raise TarError(f"{label}: holds no member")
    if len({key for key, _ in samples}) < len(samples):
        seen: set[str] = set()
        twice = next(key for key, _ in samples if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise TarError(f"{label}: the members of sample '{twice}' are not adjacent, or its key appears twice")
    return samples


def _image(key: str, members: list[TarMember], shard: Path) -> TarMember:
    for member in members:
        if split_key(member.name)[1].lower() in IMAGE_EXTENSIONS:
            return member
    names = ", ".join(member.name for member in members)
    raise TarError(f"{shard}: sample '{key}' has no image (its members: {names})")


def _label(key: str, members: list[TarMember], data: mmap.mmap, shard: Path) -> int:
    contents = {split_key(m.name)[1]: data[m.offset : m.offset + m.size] for m in members if _holds_label(m)}
    try:
        if "cls" in contents:
            return int(contents["cls"])
        if "json" in contents:
            return int(json.loads(contents["json"]).get("label", UNKNOWN_LABEL))
    except (ValueError, AttributeError, TypeError) as error:
        raise TarError(f"{shard}: sample '{key}' has an unreadable label: {error}") from error
    return UNKNOWN_LABEL


def _holds_label(member: TarMember) -> bool:
    return split_key(member.name)[1] in ("cls", "json") and member.size < 1 << 16
