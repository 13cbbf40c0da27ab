"""Sequences of a multi-view set by number, after a filter, with reads of single frames.

The filter decides everything that the packing left open: categories, set lists, quality, known bad sequences. So the
families differ here, and share the shards.
"""

from __future__ import annotations

import math
import os
import random as python_random
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from restrike.data.cache import ShardCache
from restrike.data.catalogue import CATALOGUE_NAME
from restrike.data.decode import DecodeError, decode_rgb
from restrike.data.depth_png import decode_depth, decode_mask_pair
from restrike.data.files import sha256_lines
from restrike.data.index import INDEX_SUFFIX
from restrike.data.multiview_index import MultiViewCatalogue, SceneIndex, load_multiview_catalogue
from restrike.data.opener import fetch, join, redact, scheme
from restrike.data.shards import ShardFile
from restrike.data.source import BadSampleError

UNSEEN = ("ball", "book", "couch", "frisbee", "hotdog", "kite", "remote", "sandwich", "skateboard", "suitcase")
SEEN = (
    "apple", "backpack", "banana", "baseballbat", "baseballglove", "bench", "bicycle", "bottle", "bowl",
    "broccoli", "cake", "car", "carrot", "cellphone", "chair", "cup", "donut", "hairdryer", "handbag",
    "hydrant", "keyboard", "laptop", "microwave", "motorcycle", "mouse", "orange", "parkingmeter", "pizza",
    "plant", "stopsign", "teddybear", "toaster", "toilet", "toybus", "toyplane", "toytrain", "toytruck", "tv",
    "umbrella", "vase", "wineglass",
)  # fmt: skip
# DiffusionSfM's release prints these and, whatever its name for the list says, trains on them.
BAD_DEPTH = (
    "411_55952_107659", "427_59915_115716", "435_61970_121848", "112_13265_22828", "110_13069_25642",
    "165_18080_34378", "368_39891_78502", "391_47029_93665", "20_695_1450", "135_15556_31096", "417_57572_110680",
)  # fmt: skip
_GROUPS = {"seen": SEEN, "unseen": UNSEEN}
_MAX_OPEN_SHARDS = 128


@dataclass(frozen=True)
class SceneFilter:
    """Which sequences and frames of a set to use.

    Attributes:
        categories: "seen", "unseen" (RayDiffusion's split), or names; () = all.
        subsets: set lists as "<subset>/<part>", such as "fewview_dev/train" or "vggt/train"; a frame has to be in one
            of them; () = all frames.
        min_quality: viewpoint quality above this (0.5 everywhere but VGGT); None = any. Unknown quality fails.
        min_frames: usable frames at least.
        exclude: sequences by name.
        exclude_bad_depth: DiffusionSfM's eleven.
        max_translation: drop a sequence with a camera translation of a larger absolute value.
        whole_cameras: drop a sequence that lost a frame to a bad camera.
        require_foreground: leave out frames with an empty mask (RayDiffusion).
        require_depth: leave out frames without any depth.
        max_per_category: draw so many sequences of each (CUT3R: 50, seed 42 + the category's number); None = all.
    """

    categories: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ()
    min_quality: float | None = 0.5
    min_frames: int = 1
    exclude: tuple[str, ...] = ()
    exclude_bad_depth: bool = False
    max_translation: float = 1e5
    whole_cameras: bool = True
    require_foreground: bool = False
    require_depth: bool = True
    max_per_category: int | None = None


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

    Attributes:
        rows: of every sequence, its usable frames (numbers over the whole set), in time order.
        categories, sequences: names.
        numbers, has_depth: int32 and bool, of every frame of the set.
        fingerprint: equal where sequence numbers mean the same frames.
    """

    def __init__(
        self, files: Sequence[ShardFile], indices: Sequence[SceneIndex], cache: ShardCache, filter: SceneFilter
    ) -> None:
        self.files, self._cache, self.filter = list(files), cache, filter
        self._first_row = np.cumsum([0, *(len(index.numbers) for index in indices)])
        join_rows = {
            name: np.concatenate([getattr(index, name) for index in indices])
            for name in ("numbers", "intrinsics", "world_to_camera", "offsets", "lengths", "sizes", "has_depth")
        }
        self.numbers, self._intrinsics, self._cameras = (
            join_rows["numbers"], join_rows["intrinsics"], join_rows["world_to_camera"],
        )  # fmt: skip
        self._offsets, self._lengths, self._sizes = join_rows["offsets"], join_rows["lengths"], join_rows["sizes"]
        self.has_depth = join_rows["has_depth"]
        self.rows: list[np.ndarray] = []
        self.categories: list[str] = []
        self.sequences: list[str] = []
        _check_filter(indices, filter)
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

    def will_read(self, scenes: np.ndarray) -> list[ShardFile]:
        """The remote files that hold these scenes."""
        shards = sorted({self._shard(int(self.rows[scene][0])) for scene in scenes.tolist()})
        return [self.files[shard] for shard in shards if scheme(self.files[shard].location) != "file"]

    def read(self, scene: int, positions: np.ndarray) -> list[RawView]:
        """Decode frames of a scene, each one read of adjacent members.

        Raises:
            BadSampleError: a frame cannot be read or decoded; says which and why.
        """
        return [self._read_frame(int(self.rows[scene][position])) for position in positions.tolist()]

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
        keep = _usable_frames(index, self.filter)
        for number in range(len(index)):
            rows = np.arange(index.first[number], index.first[number + 1])
            rows = rows[keep[rows]]
            if len(rows) >= max(1, self.filter.min_frames) and _is_wanted(index, number, self.filter):
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

    def _read_frame(self, row: int) -> RawView:
        begin, end = int(self._offsets[row, 0]), int(self._offsets[row, 2] + self._lengths[row, 2])
        data = self._pread(row, end - begin, begin)
        parts = [data[o - begin : o - begin + n] for o, n in zip(self._offsets[row], self._lengths[row], strict=True)]
        try:
            image, depth = decode_rgb(parts[1]), decode_depth(parts[0])
            foreground, depth_mask = decode_mask_pair(parts[2])
        except DecodeError as error:
            raise BadSampleError(f"frame {self.numbers[row]}: {error}") from error
        if not image.shape[:2] == depth.shape == foreground.shape == tuple(self._sizes[row]):
            raise BadSampleError(f"frame {self.numbers[row]}: image, depth and masks are not of one size")
        fx, fy, cx, cy = self._intrinsics[row].tolist()
        intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float32)
        return RawView(image, depth, depth_mask, foreground, intrinsics, self._cameras[row], int(self.numbers[row]))

    def _pread(self, row: int, size: int, offset: int) -> bytes:
        shard = self._shard(row)
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise BadSampleError(f"the shard cannot be read: {error}") from error
        if len(data) < size:
            raise BadSampleError(f"the shard is truncated: {len(data)} of {size} bytes of frame {self.numbers[row]}")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            file = self.files[shard]
            self._open[shard] = self._cache.open(file.location, file.bytes, file.sha256)
            if len(self._open) > _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return self._open[shard]


def open_scenes(data: str, cache: ShardCache, filter: SceneFilter) -> SceneSource:
    """A prepared multi-view set (folder or URL), filtered.

    Raises:
        ValueError: no such set, a damaged catalogue or index, a truncated shard; each with its mend.
    """
    catalogue = read_multiview_catalogue(data, cache)
    files = [ShardFile(join(data, s.name), s.bytes, s.sha256, s.index_sha256) for s in catalogue.shards]
    indices = []
    for file in files:
        location = re.sub(r"\.tar(?=$|\?|#)", INDEX_SUFFIX, file.location)
        is_local = scheme(file.location) == "file"
        path = Path(location) if is_local else cache.path(location, None, file.index_sha256)
        if is_local:
            tar = Path(file.location)
            size = tar.stat().st_size if tar.is_file() else -1
            if size != file.bytes:
                came = "is missing" if size < 0 else f"has {size} bytes, its catalogue says {file.bytes}"
                raise ValueError(f"shard {tar} {came}; prepare or fetch this shard again")
        indices.append(SceneIndex.load(path))
    return SceneSource(files, indices, cache, filter)


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


def _check_filter(indices: Sequence[SceneIndex], filter: SceneFilter) -> None:
    """A name that the whole set does not know is a mistake, and not an empty choice."""
    known = {bytes(name).decode() for index in indices for name in index.subset_names}
    if unknown := [name for name in filter.subsets if name not in known]:
        raise ValueError(
            f"data filter: the set has no subset '{unknown[0]}'; it has {', '.join(sorted(known)) or 'none'}"
        )
    present = {bytes(name).decode() for index in indices for name in index.categories}
    names = [name for name in filter.categories if name not in _GROUPS]
    if unknown := [name for name in names if name not in present]:
        raise ValueError(f"data filter: the set has no category '{unknown[0]}'; it has {', '.join(sorted(present))}")


def _usable_frames(index: SceneIndex, filter: SceneFilter) -> np.ndarray:
    """bool [m]."""
    keep = np.ones(len(index.numbers), dtype=bool)
    if filter.subsets:
        names = [bytes(name).decode() for name in index.subset_names]
        rows = [names.index(name) for name in filter.subsets if name in names]
        keep &= (index.subset_positions[rows] >= 0).any(0)
    if filter.require_foreground:
        keep &= index.boxes[:, 2] > index.boxes[:, 0]
    if filter.require_depth:
        keep &= index.has_depth
    return keep


def _is_wanted(index: SceneIndex, number: int, filter: SceneFilter) -> bool:
    category, sequence = bytes(index.categories[number]).decode(), bytes(index.sequences[number]).decode()
    wanted = {name for entry in filter.categories for name in _GROUPS.get(entry, (entry,))}
    quality = float(index.quality[number])
    if wanted and category not in wanted:
        return False
    if sequence in filter.exclude or (filter.exclude_bad_depth and sequence in BAD_DEPTH):
        return False
    if filter.min_quality is not None and (math.isnan(quality) or quality <= filter.min_quality):
        return False
    if filter.whole_cameras and index.bad_cameras[number]:
        return False
    rows = slice(index.first[number], index.first[number + 1])
    return bool(np.abs(index.world_to_camera[rows, :, 3]).max(initial=0) <= filter.max_translation)
