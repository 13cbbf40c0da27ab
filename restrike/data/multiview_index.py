"""Multi-view shards: one tar sample is one sequence, with a sidecar index of its cameras and of every frame's bytes.

Members of a sample, adjacent and in frame order: `<category>-<sequence>.0.seq.json` (cameras, sizes, subsets), then
per frame `.0000.depth.png .0000.jpg .0000.mask.png` (foreground above depth mask). A stock webdataset reader yields
the whole sequence as one dict; the index lets ours read only the frames that it drew. Nothing about splits is decided
here: every set list of the data set is kept, so that one shard set serves every family's filters.
"""

from __future__ import annotations

import mmap
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from restrike.data.catalogue import ShardEntry, check_shard_name
from restrike.data.files import write_atomically
from restrike.data.index import SavedIndex, split_key
from restrike.data.tar import TarError, TarMember, iter_members

MULTIVIEW_FORMAT = "restrike-multiview-1"
_UNKNOWN = [float("nan")] * 12  # a camera: JSON has no NaN


class PackedFrame(msgspec.Struct, frozen=True):
    """A frame of a shard. Sizes are (H, W); the camera is OpenCV's, [] where unknown; its intrinsics (fx, fy, cx, cy)
    are in pixels of the stored image with its corner at 0; box (left, top, right, bottom) of the foreground, all 0
    where there is none.
    """

    number: int
    name: str
    timestamp: float
    original_size: tuple[int, int]
    size: tuple[int, int]
    world_to_camera: list[float]
    intrinsics: tuple[float, float, float, float]
    box: tuple[int, int, int, int]
    has_depth: bool


class PackedSequence(msgspec.Struct, frozen=True):
    """The `.seq.json` of a sample. `subsets` holds rows of `frames` in the order of each list."""

    category: str
    sequence: str
    quality: float | None
    left_out: int
    bad_cameras: int
    subsets: dict[str, list[int]]
    frames: list[PackedFrame]


@dataclass(frozen=True)
class SceneIndex(SavedIndex):
    """Arrays over the n sequences and m frames of one shard, in file order.

    Attributes:
        keys: bytes [n], "<category>-<sequence>".
        categories, sequences: bytes [n].
        quality: float32 [n], viewpoint quality; NaN where unknown.
        left_out, bad_cameras: int32 [n], frames that were not packed, and those of them whose camera was bad.
        first: int64 [n + 1], rows of frames.
        numbers: int32 [m], frame_number.
        timestamps: float64 [m], seconds.
        original_sizes, sizes: int32 [m, 2], (H, W).
        world_to_camera: float32 [m, 3, 4]; NaN where unknown.
        intrinsics: float32 [m, 4], fx, fy, cx, cy.
        boxes: int32 [m, 4].
        has_depth: bool [m].
        subset_names: bytes [s].
        subset_positions: int16 [s, m], place in the sequence's part of a list, -1 = not in it.
        offsets, lengths: int64 [m, 3], of depth, image and mask in the tar.
        frame_crc32: uint32 [m], of a frame's bytes, from its depth's first to its mask's last.
        starts: int64 [n + 1]; crc32: uint32 [n], of bytes starts[i]:starts[i + 1].
        tar_bytes: length of the tar.
    """

    keys: np.ndarray
    categories: np.ndarray
    sequences: np.ndarray
    quality: np.ndarray
    left_out: np.ndarray
    bad_cameras: np.ndarray
    first: np.ndarray
    numbers: np.ndarray
    timestamps: np.ndarray
    original_sizes: np.ndarray
    sizes: np.ndarray
    world_to_camera: np.ndarray
    intrinsics: np.ndarray
    boxes: np.ndarray
    has_depth: np.ndarray
    subset_names: np.ndarray
    subset_positions: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    frame_crc32: np.ndarray
    starts: np.ndarray
    crc32: np.ndarray

    kind = "multi-view index"
    version = 2

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sequence: int) -> str:
        return bytes(self.keys[sequence]).decode()


class MultiViewCatalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A multi-view shard set: `profile` (S, L or full), categories, sequences and frames in all, and its shards, whose
    `samples` are sequences. No time stamp: preparing the same data again gives the same bytes."""

    name: str
    profile: str
    categories: list[str]
    sequences: int
    frames: int
    left_out: int
    shards: list[ShardEntry]
    format: str = MULTIVIEW_FORMAT

    def save(self, path: Path) -> None:
        write_atomically(path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def load_multiview_catalogue(data: bytes, label: str) -> MultiViewCatalogue:
    """Read and check a catalogue.

    Raises:
        ValueError: another kind of file, or inconsistent; says how to mend it.
    """
    mend = "make the set with `python -m cli prepare co3d`"
    try:
        catalogue = msgspec.json.decode(data, type=MultiViewCatalogue)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{label} is not the catalogue of a multi-view set ({error}); {mend}") from error
    if catalogue.format != MULTIVIEW_FORMAT:
        raise ValueError(f"{label}: format '{catalogue.format}', this code reads '{MULTIVIEW_FORMAT}'; {mend}")
    for shard in catalogue.shards:
        check_shard_name(shard.name, label)
    if sum(shard.samples for shard in catalogue.shards) != catalogue.sequences:
        raise ValueError(f"{label}: sequences of the shards do not sum to {catalogue.sequences}; {mend}")
    return catalogue


def build_scene_index(shard: Path) -> SceneIndex:
    """Read back a shard.

    Raises:
        TarError: damaged or truncated tar, a refused member, or a sample that is not as its `.seq.json` says.
    """
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        samples: dict[str, list[TarMember]] = {}
        for member in iter_members(data, str(shard)):
            samples.setdefault(split_key(member.name)[0], []).append(member)
        if not samples:
            raise TarError(f"{shard}: holds no member")
        about = [_read_about(key, members, data, shard) for key, members in samples.items()]
        places = [_places(key, one, members, shard) for (key, members), one in zip(samples.items(), about, strict=True)]
        starts = [members[0].start for members in samples.values()]
        last = next(reversed(samples.values()))[-1]
        starts.append(-(-(last.offset + last.size) // 512) * 512)
        checks = [zlib.crc32(data[start:end]) for start, end in pairwise(starts)]
        spans = frame_spans(*np.moveaxis(np.concatenate(places), 1, 0))
        frame_checks = [zlib.crc32(data[begin:end]) for begin, end in spans.tolist()]
        size = len(data)
    return _join(list(samples), about, np.concatenate(places), frame_checks, starts, checks, size)


def frame_spans(offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """First and last + 1 byte of frames, int64 [..., 2]: depth, image and mask are adjacent, and so one read."""
    return np.stack([offsets[..., 0], offsets[..., 2] + lengths[..., 2]], axis=-1)


def _read_about(key: str, members: list[TarMember], data: mmap.mmap, shard: Path) -> PackedSequence:
    first = members[0]
    if split_key(first.name)[1] != "0.seq.json":
        raise TarError(f"{shard}: sample '{key}' does not begin with its .0.seq.json but with '{first.name}'")
    try:
        return msgspec.json.decode(data[first.offset : first.offset + first.size], type=PackedSequence)
    except msgspec.DecodeError as error:
        raise TarError(f"{shard}: '{first.name}': {error}") from None


def _places(key: str, about: PackedSequence, members: list[TarMember], shard: Path) -> np.ndarray:
    """Offsets and lengths [frames, 2, 3] of depth, image, mask."""
    found = {split_key(member.name)[1]: member for member in members}
    places = np.zeros((len(about.frames), 2, 3), dtype=np.int64)
    for row in range(len(about.frames)):
        for column, kind in enumerate(("depth.png", "jpg", "mask.png")):
            member = found.get(f"{row:04d}.{kind}")
            if member is None:
                raise TarError(f"{shard}: sample '{key}' has no member {key}.{row:04d}.{kind}; prepare this set again")
            places[row, :, column] = member.offset, member.size
    return places


def _join(
    keys: list[str],
    about: list[PackedSequence],
    places: np.ndarray,
    frame_checks: list[int],
    starts: list[int],
    checks: list[int],
    size: int,
) -> SceneIndex:
    frames = [frame for one in about for frame in one.frames]
    first = np.cumsum([0, *(len(one.frames) for one in about)])
    names = sorted({name for one in about for name in one.subsets})
    positions = np.full((len(names), len(frames)), -1, dtype=np.int16)
    for one, start in zip(about, first, strict=False):
        for name, rows in one.subsets.items():
            positions[names.index(name), start + np.array(rows, dtype=np.int64)] = np.arange(len(rows))
    return SceneIndex(
        keys=np.array([key.encode() for key in keys], dtype=np.bytes_),
        categories=np.array([one.category.encode() for one in about], dtype=np.bytes_),
        sequences=np.array([one.sequence.encode() for one in about], dtype=np.bytes_),
        quality=np.array([np.nan if one.quality is None else one.quality for one in about], dtype=np.float32),
        left_out=np.array([one.left_out for one in about], dtype=np.int32),
        bad_cameras=np.array([one.bad_cameras for one in about], dtype=np.int32),
        first=first.astype(np.int64),
        numbers=np.array([frame.number for frame in frames], dtype=np.int32),
        timestamps=np.array([frame.timestamp for frame in frames], dtype=np.float64),
        original_sizes=np.array([frame.original_size for frame in frames], dtype=np.int32).reshape(-1, 2),
        sizes=np.array([frame.size for frame in frames], dtype=np.int32).reshape(-1, 2),
        world_to_camera=np.array([frame.world_to_camera or _UNKNOWN for frame in frames], dtype=np.float32).reshape(
            -1, 3, 4
        ),
        intrinsics=np.array([frame.intrinsics for frame in frames], dtype=np.float32).reshape(-1, 4),
        boxes=np.array([frame.box for frame in frames], dtype=np.int32).reshape(-1, 4),
        has_depth=np.array([frame.has_depth for frame in frames], dtype=bool),
        subset_names=np.array([name.encode() for name in names], dtype=np.bytes_),
        subset_positions=positions,
        offsets=places[:, 0],
        lengths=places[:, 1],
        frame_crc32=np.array(frame_checks, dtype=np.uint32),
        starts=np.array(starts, dtype=np.int64),
        crc32=np.array(checks, dtype=np.uint32),
        tar_bytes=size,
    )
