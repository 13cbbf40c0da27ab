"""Where labelled images come from: a shard set or a folder tree, seen alike as N numbered samples."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from restrike.data.cache import ShardCache
from restrike.data.files import sha256_lines
from restrike.data.index import UNKNOWN_LABEL, ShardIndex
from restrike.data.opener import redact, scheme
from restrike.data.shards import ShardFile

_MAX_OPEN_SHARDS = 128  # well under the usual limit of 1024 open files a process


class BadSampleError(ValueError):
    """One sample cannot be used; the message is the reason, without key and place."""


class ImageSource(Protocol):
    """N images with labels.

    Attributes:
        class_names: by index.
        labels: int32 [N], as stored: may lie outside the classes; -1 = unknown.
        shard_sizes: int64, in storage order, sums to N; all ones where any order of reading costs the same.
        window: samples to shuffle together so that reading stays local; 0 = no bound.
        fingerprint: equal for sets whose sample numbers mean the same images.
    """

    class_names: list[str]
    labels: np.ndarray
    shard_sizes: np.ndarray
    window: int
    fingerprint: str

    def __len__(self) -> int: ...

    def key(self, sample: int) -> str:
        """A name for messages and predictions."""
        ...

    def place(self, sample: int) -> str:
        """The file that holds the sample (no secrets)."""
        ...

    def read(self, sample: int) -> bytes:
        """The image file's bytes. Raises BadSampleError where they cannot be had."""
        ...

    def will_read(self, samples: np.ndarray) -> list[ShardFile]:
        """The remote files that hold these samples (none where reading is local)."""
        ...


def label_of(source: ImageSource, sample: int) -> int:
    """A sample's class.

    Raises:
        BadSampleError: no class of this set.
    """
    label = int(source.labels[sample])
    if not 0 <= label < len(source.class_names):
        raise BadSampleError(f"label {label} is out of range: the set has classes 0 to {len(source.class_names) - 1}")
    return label


def class_counts(source: ImageSource) -> list[int]:
    """Images per class; labels out of range are not counted."""
    valid = source.labels[(source.labels >= 0) & (source.labels < len(source.class_names))]
    return np.bincount(valid, minlength=len(source.class_names)).tolist()


class ShardSource:
    """Random access to the samples of indexed shards, fetched to this node when first needed.

    Args:
        files, indices: the shards, in order.
        class_names: by index.
        cache: brings remote shards here.
        window_shards: shuffle windows of that many shards of mean size.
    """

    def __init__(
        self,
        files: Sequence[ShardFile],
        indices: Sequence[ShardIndex],
        class_names: list[str],
        cache: ShardCache,
        window_shards: int = 8,
    ) -> None:
        self.files, self.class_names, self._cache = list(files), class_names, cache
        self._keys = [index.keys for index in indices]
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self.labels = np.concatenate([index.labels for index in indices])
        self.shard_sizes = np.array([len(index) for index in indices], dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self.window = window_shards * -(-len(self.labels) // len(self.files))
        lines = [f"{file.name} {len(index)} {index.tar_bytes}" for file, index in zip(files, indices, strict=True)]
        self.fingerprint = sha256_lines(lines)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._failed: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, sample: int) -> str:
        shard = self._shard(sample)
        row = sample - int(self._ends[shard]) + int(self.shard_sizes[shard])
        return bytes(self._keys[shard][row]).decode("utf-8", "surrogateescape")

    def place(self, sample: int) -> str:
        return f"shard {redact(self.files[self._shard(sample)].location)}"

    def read(self, sample: int) -> bytes:
        shard, size = self._shard(sample), int(self._sizes[sample])
        try:
            # pread and not mmap: where a file shrinks under us this is a short read, and not a bus error.
            data = os.pread(self._descriptor(shard), size, int(self._offsets[sample]))
        except OSError as error:
            raise BadSampleError(f"the shard cannot be read: {error.strerror or error}") from error
        if len(data) < size:
            raise BadSampleError(f"the shard is truncated: {len(data)} of {size} bytes")
        return data

    def will_read(self, samples: np.ndarray) -> list[ShardFile]:
        shards = np.unique(np.searchsorted(self._ends, samples, side="right"))
        return [self.files[shard] for shard in shards if scheme(self.files[shard].location) != "file"]

    def close(self) -> None:
        """Close open shards; they open again on demand."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_failed": {}}  # descriptors stay with their process

    def _shard(self, sample: int) -> int:
        return int(np.searchsorted(self._ends, sample, side="right"))

    def _descriptor(self, shard: int) -> int:
        if shard in self._failed:  # a shard that did not come after all retries is not asked for again
            raise BadSampleError(self._failed[shard])
        if shard not in self._open:
            file = self.files[shard]
            try:
                self._open[shard] = self._cache.open(file.location, file.bytes, file.sha256)
            except OSError as error:
                self._failed[shard] = f"the shard cannot be opened: {error}"
                raise BadSampleError(self._failed[shard]) from error
            if len(self._open) > _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return self._open[shard]


class FolderSource:
    """Images in a folder tree.

    Args:
        root: what paths are relative to.
        paths: of the images, in order.
        labels: class of each; None = unknown.
        class_names: by index.
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int] | None, class_names: list[str]) -> None:
        self.root, self.class_names = root, class_names
        # One array and not a list of strings: forked workers then share its pages.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.labels = np.array([UNKNOWN_LABEL] * len(paths) if labels is None else labels, dtype=np.int32)
        self.shard_sizes = np.ones(len(paths), dtype=np.int64)
        self.window = 0
        self.fingerprint = sha256_lines([*class_names, *paths])

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, sample: int) -> str:
        return os.fsdecode(bytes(self._paths[sample]))

    def place(self, sample: int) -> str:
        return f"folder {self.root}"

    def read(self, sample: int) -> bytes:
        try:
            return (self.root / self.key(sample)).read_bytes()
        except OSError as error:
            raise BadSampleError(f"the file cannot be read: {error.strerror or error}") from error

    def will_read(self, samples: np.ndarray) -> list[ShardFile]:
        return []
