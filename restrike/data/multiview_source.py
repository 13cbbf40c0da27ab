"""Sequences of a multi-view set by number, after a filter, with reads of single frames.

A frame is one read: of a local file, of a shard in this node's cache, or of a byte range of a remote shard.
"""

from __future__ import annotations

import logging
import os
import random as python_random
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from restrike.data.cache import ShardCache
from restrike.data.catalogue import CATALOGUE_NAME
from restrike.data.decode import DecodeError, decode_rgb
from restrike.data.depth_png import decode_depth, decode_mask_pair
from restrike.data.files import sha256_lines
from restrike.data.index import INDEX_SUFFIX
from restrike.data.multiview_filter import SceneFilter, check_filter, is_wanted, usable_frames
from restrike.data.multiview_index import MultiViewCatalogue, SceneIndex, frame_spans, load_multiview_catalogue
from restrike.data.opener import NoRangesError, fetch, join, read_range, redact, scheme
from restrike.data.ranges import Piece, read_pieces
from restrike.data.shards import ShardFile
from restrike.data.source import BadSampleError

_LOG = logging.getLogger(__name__)
Access = Literal["cache", "range"]
_MAX_OPEN_SHARDS = 128


class RawView(NamedTuple):
    """A stored frame: uint8 [H, W, 3]; float32 [H, W], 0 = unknown; bool [H, W]; uint8 [H, W]; [3, 3] and [3, 4]."""

    image: np.ndarray
    depth: np.ndarray
    depth_mask: np.ndarray
    foreground: np.ndarray
    intrinsics: np.ndarray
    world_to_camera: np.ndarray
    number: int


class SceneSource:
    """The sequences that a filter leaves of indexed shards.

    Args:
        files, indices: the shards, in order.
        cache: brings remote shards here.
        filter: which sequences and frames.
        access: how to read remote shards: "cache" brings each whole to this node when first needed, "range" reads the
            frames that are drawn, every time.

    Attributes:
        rows: of every sequence, its usable frames (numbers over the whole set), in time order.
        categories, sequences: names.
        numbers, has_depth: int32 and bool, of every frame of the set.
        fingerprint: equal where sequence numbers mean the same frames.
    """

    def __init__(
        self,
        files: Sequence[ShardFile],
        indices: Sequence[SceneIndex],
        cache: ShardCache,
        filter: SceneFilter,
        access: Access = "cache",
    ) -> None:
        self.files, self._cache, self.filter, self.access = list(files), cache, filter, access
        self._first_row = np.cumsum([0, *(len(index.numbers) for index in indices)])
        join_rows = {
            name: np.concatenate([getattr(index, name) for index in indices])
            for name in ("numbers", "intrinsics", "world_to_camera", "offsets", "lengths", "sizes", "has_depth",
                         "frame_crc32")
        }  # fmt: skip
        self.numbers, self._intrinsics, self._cameras = (
            join_rows["numbers"], join_rows["intrinsics"], join_rows["world_to_camera"],
        )  # fmt: skip
        self._offsets, self._lengths, self._sizes = join_rows["offsets"], join_rows["lengths"], join_rows["sizes"]
        self._spans, self._crc32 = frame_spans(self._offsets, self._lengths), join_rows["frame_crc32"]
        self.has_depth = join_rows["has_depth"]
        self.rows: list[np.ndarray] = []
        self.categories: list[str] = []
        self.sequences: list[str] = []
        check_filter(indices, filter)
        for shard, index in enumerate(indices):
            self._select(index, int(self._first_row[shard]))
        self._limit_per_category()
        lines = [f"{file.name} {index.tar_bytes}" for file, index in zip(files, indices, strict=True)]
        self.fingerprint = sha256_lines([*lines, repr(filter)])
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, scene: int) -> str:
        return f"{self.categories[scene]}/{self.sequences[scene]}"

    def place(self, scene: int) -> str:
        return f"shard {redact(self.files[self._shard(int(self.rows[scene][0]))].location)}"

    def cameras(self, scene: int) -> np.ndarray:
        """world_to_camera of all usable frames, float32 [frames, 3, 4]."""
        return self._cameras[self.rows[scene]]

    def will_read(self, scenes: np.ndarray) -> list[ShardFile]:
        """The remote files that hold these scenes, and that are read whole."""
        if self.access == "range":
            return []
        shards = sorted({self._shard(int(self.rows[scene][0])) for scene in scenes.tolist()})
        return [self.files[shard] for shard in shards if scheme(self.files[shard].location) != "file"]

    def read(self, scene: int, positions: np.ndarray) -> list[RawView]:
        """Decode frames of a scene, each one read of adjacent members; one that is drawn twice is decoded once.

        Raises:
            BadSampleError: a frame cannot be read or decoded, or has other bytes than were packed; says which and why.
        """
        rows = self.rows[scene][positions].tolist()
        distinct = list(dict.fromkeys(rows))
        views = dict(zip(distinct, map(self._decode, distinct, self._bytes(distinct)), strict=True))
        return [views[row] for row in rows]

    def close(self) -> None:
        """Close open shards; they open again on demand."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors stay with their process

    def _select(self, index: SceneIndex, offset: int) -> None:
        keep = usable_frames(index, self.filter)
        for number in range(len(index)):
            rows = np.arange(index.first[number], index.first[number + 1])
            rows = rows[keep[rows]]
            if len(rows) >= max(1, self.filter.min_frames) and is_wanted(index, number, self.filter):
                self.rows.append(offset + rows)
                self.categories.append(bytes(index.categories[number]).decode())
                self.sequences.append(bytes(index.sequences[number]).decode())

    def _limit_per_category(self) -> None:
        limit = self.filter.max_per_category
        if limit is None:
            return
        keep: list[int] = []
        for number, category in enumerate(sorted(set(self.categories))):
            own = [scene for scene, name in enumerate(self.categories) if name == category]
            keep += own if len(own) <= limit else python_random.Random(42 + number).sample(own, limit)
        keep.sort()
        self.rows = [self.rows[scene] for scene in keep]
        self.categories = [self.categories[scene] for scene in keep]
        self.sequences = [self.sequences[scene] for scene in keep]

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self._first_row, row, side="right")) - 1

    def _bytes(self, rows: list[int]) -> list[bytes]:
        """Of frames of one shard, checked."""
        file = self.files[self._shard(rows[0])]
        if self.access == "range" and scheme(file.location) != "file":
            spans = [(*self._spans[row].tolist(), int(self._crc32[row])) for row in rows]
            pieces = [Piece._make(span) for span in spans]
            try:
                return read_pieces(file.location, pieces, self._cache.transfer, file.bytes)
            except OSError as error:
                raise BadSampleError(f"frames cannot be read: {error}") from error
        return [self._pread(row) for row in rows]

    def _decode(self, row: int, data: bytes) -> RawView:
        begin = int(self._spans[row, 0])
        parts = [data[o - begin : o - begin + n] for o, n in zip(self._offsets[row], self._lengths[row], strict=True)]
        try:
            image, depth = decode_rgb(parts[1]), decode_depth(parts[0])
            foreground, depth_mask = decode_mask_pair(parts[2])
        except DecodeError as error:
            raise BadSampleError(f"{self._name(row)}: {error}") from error
        if not image.shape[:2] == depth.shape == foreground.shape == tuple(self._sizes[row]):
            raise BadSampleError(f"{self._name(row)}: image, depth and masks are not of one size")
        fx, fy, cx, cy = self._intrinsics[row].tolist()
        intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float32)
        return RawView(image, depth, depth_mask, foreground, intrinsics, self._cameras[row], int(self.numbers[row]))

    def _pread(self, row: int) -> bytes:
        begin, end = self._spans[row].tolist()
        try:
            data = os.pread(self._descriptor(self._shard(row)), end - begin, begin)
        except OSError as error:
            raise BadSampleError(f"the shard cannot be read: {error}") from error
        if len(data) < end - begin:
            raise BadSampleError(f"the shard is truncated: {len(data)} of {end - begin} bytes of {self._name(row)}")
        if zlib.crc32(data) != self._crc32[row]:
            raise BadSampleError(
                f"{self._name(row)}: damaged: its bytes are not those that were packed (CRC differs); "
                "prepare or fetch this shard again"
            )
        return data

    def _name(self, row: int) -> str:
        return f"frame {self.numbers[row]}"

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            file = self.files[shard]
            self._open[shard] = self._cache.open(file.location, file.bytes, file.sha256)
            if len(self._open) > _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return self._open[shard]


def open_scenes(data: str, cache: ShardCache, filter: SceneFilter, access: Access = "cache") -> SceneSource:
    """A prepared multi-view set (folder or URL), filtered.

    A server that sends whole files only is told of in the log, and its shards are cached.

    Raises:
        ValueError: no such set, a damaged catalogue or index, a truncated shard; each with its mend.
    """
    catalogue = read_multiview_catalogue(data, cache)
    files = [ShardFile(join(data, s.name), s.bytes, s.sha256, s.index_sha256) for s in catalogue.shards]
    indices = [_load_index(file, cache) for file in files]
    if access == "range" and scheme(data) != "file" and files:
        try:
            read_range(files[0].location, 0, 1, cache.transfer, files[0].bytes)
        except NoRangesError as error:
            _LOG.warning('data.access: range: %s; whole shards are cached instead, as by "cache"', error)
            access = "cache"
    return SceneSource(files, indices, cache, filter, access)


def _load_index(file: ShardFile, cache: ShardCache) -> SceneIndex:
    location = re.sub(r"\.tar(?=$|\?|#)", INDEX_SUFFIX, file.location)
    if scheme(file.location) != "file":
        return SceneIndex.load(cache.path(location, None, file.index_sha256))
    tar = Path(file.location)
    size = tar.stat().st_size if tar.is_file() else -1
    if size != file.bytes:
        came = "is missing" if size < 0 else f"has {size} bytes, its catalogue says {file.bytes}"
        raise ValueError(f"shard {tar} {came}; prepare or fetch this shard again")
    return SceneIndex.load(Path(location))


def read_multiview_catalogue(data: str, cache: ShardCache) -> MultiViewCatalogue:
    """The catalogue of a set. Raises ValueError: none there, or damaged."""
    location = join(data, CATALOGUE_NAME)
    mend = "make one with `python -m cli prepare toy --out TREE` and `python -m cli prepare co3d --src TREE --out SET`"
    if scheme(data) == "file":
        path = Path(location).expanduser()
        if not path.is_file():
            raise ValueError(f"data.data: no multi-view set in {data} ({CATALOGUE_NAME} is missing); {mend}")
        return load_multiview_catalogue(path.read_bytes(), str(path))
    cache.folder.mkdir(parents=True, exist_ok=True)
    path = cache.folder / f"multiview-catalogue-{os.getpid()}.partial"
    try:
        fetch(location, path, cache.transfer)
        return load_multiview_catalogue(path.read_bytes(), redact(location))
    finally:
        path.unlink(missing_ok=True)
