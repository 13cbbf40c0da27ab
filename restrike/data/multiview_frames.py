"""Which frames an evaluation shows, frozen: a file {category: {sequence: [frame numbers]}} with its hash.

Scores of two runs are comparable only on equal frames. What a seed draws depends on the filter, on the frames that a
set lost when it was packed, and on numpy; a file depends on nothing. Published orders of others can be read as well.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from restrike.data.files import write_atomically
from restrike.data.multiview_source import SceneSource
from restrike.data.randomness import Purpose, stream
from restrike.data.source import BadSampleError
from restrike.data.views import ViewSampler, replace_empty

FrameLists = dict[str, dict[str, list[int]]]
T = TypeVar("T")


class DrawnViews(NamedTuple):
    """Views of a scene of a source: positions int64 [V] in its usable frames, is_video bool [V]."""

    scene: int
    positions: np.ndarray
    is_video: np.ndarray


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    frames: FrameLists


def draw_views(
    source: SceneSource, sampler: ViewSampler, scene: int, start: int, count: int, random: np.random.Generator
) -> DrawnViews:
    """`count` views of a scene.

    Raises:
        BadSampleError: the sampler wants depth, and no frame has any.
    """
    rows = source.rows[scene]
    positions, as_video = sampler.draw(len(rows), start, count, random)
    is_video = np.full(count, as_video)
    if sampler.replaces_empty:
        positions, last = replace_empty(positions, source.has_depth[rows], random)
        is_video[last:] = False
    return DrawnViews(scene, positions, is_video)


def draw_every_scene(source: SceneSource, sampler: ViewSampler, count: int, seed: int) -> list[DrawnViews]:
    """`count` views of each scene, from its first frame on where that matters; the same for the same seed.

    Raises:
        ValueError: a scene without any depth, where the sampler wants some; names it.
    """
    drawn = []
    for scene in range(len(source)):
        try:
            drawn.append(draw_views(source, sampler, scene, 0, count, stream(seed, Purpose.VIEWS, scene)))
        except BadSampleError as error:
            raise ValueError(f"sequence '{source.key(scene)}': {error}; set require_depth in its filter") from error
    return drawn


def frame_lists_of(source: SceneSource, drawn: list[DrawnViews]) -> FrameLists:
    """Drawn views by name and frame number."""
    lists: FrameLists = {}
    for scene, positions, _ in drawn:
        numbers = source.numbers[source.rows[scene][positions]].tolist()
        lists.setdefault(source.categories[scene], {})[source.sequences[scene]] = numbers
    return lists


def save_frame_lists(path: Path, lists: FrameLists) -> str:
    """Write a list file; returns the hash of what it lists."""
    digest = frame_lists_hash(lists)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.format(msgspec.json.encode(_File(digest, lists)), indent=0) + b"\n")
    return digest


def frame_lists_hash(lists: FrameLists) -> str:
    """SHA-256 of the lists themselves, however they are written down."""
    return hashlib.sha256(msgspec.json.encode(lists, order="sorted")).hexdigest()


def load_frame_lists(path: Path) -> FrameLists:
    """Read a list file, with its hash or (from elsewhere) the bare lists.

    Raises:
        ValueError: missing, another kind of file, or changed since it was written.
    """
    data = _read(path)
    if b'"sha256"' not in data:
        return _decode(data, FrameLists, path)
    file = _decode(data, _File, path)
    if (found := frame_lists_hash(file.frames)) != file.sha256:
        raise ValueError(
            f"data.val_frames: {path} was changed since it was written: its frames hash to {found[:16]}…, it says "
            f"{file.sha256[:16]}…; take the original, or delete the sha256 to use it as it is"
        )
    return file.frames


def load_frame_orders(folder: Path, source: SceneSource) -> FrameLists:
    """Orders as RelPose++ publishes them and DiffusionSfM uses them: a folder of `<category>.json`, {sequence:
    [indices]}, which count the sequence's frames after RayDiffusion's filter (that of `source`, in time order).
    Sequences that the filter leaves out are skipped.

    Raises:
        ValueError: no such file, or an index beyond a sequence's frames.
    """
    lists: FrameLists = {}
    scenes = _scenes_by_name(source)
    for category in sorted(set(source.categories)):
        path = folder / f"{category}.json"
        for sequence, order in _decode(_read(path), dict[str, list[int]], path).items():
            if (scene := scenes.get((category, sequence))) is None:
                continue
            rows = source.rows[scene]
            if bad := [index for index in order if not 0 <= index < len(rows)]:
                raise ValueError(
                    f"{path}: index {bad[0]} of sequence '{sequence}', which has {len(rows)} frames after the filter; "
                    "use the filter and set lists that the orders were made with"
                )
            lists.setdefault(category, {})[sequence] = source.numbers[rows[order]].tolist()
    return lists


def find_frames(source: SceneSource, lists: FrameLists, count: int, label: str) -> list[DrawnViews]:
    """The first `count` listed frames of every listed sequence.

    Raises:
        ValueError: a sequence or frame that the source lacks, or too few frames; names them.
    """
    scenes = _scenes_by_name(source)
    drawn = []
    for category, sequences in lists.items():
        for sequence, numbers in sequences.items():
            name = f"data.val_frames: {label}: sequence '{category}/{sequence}'"
            if (scene := scenes.get((category, sequence))) is None:
                raise ValueError(f"{name} is not in the set, or data.val_filter leaves it out")
            if len(numbers) < count:
                raise ValueError(f"{name} lists {len(numbers)} frames, data.val_shape.views asks for {count}")
            place = {number: k for k, number in enumerate(source.numbers[source.rows[scene]].tolist())}
            if missing := [number for number in numbers[:count] if number not in place]:
                raise ValueError(f"{name} has no usable frame {missing[0]}; it was not packed, or the filter drops it")
            positions = np.array([place[number] for number in numbers[:count]], dtype=np.int64)
            drawn.append(DrawnViews(scene, positions, np.zeros(count, dtype=bool)))
    if not drawn:
        raise ValueError(f"data.val_frames: {label} lists no sequence")
    return drawn


def _scenes_by_name(source: SceneSource) -> dict[tuple[str, str], int]:
    return {name: scene for scene, name in enumerate(zip(source.categories, source.sequences, strict=True))}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"data.val_frames: {path}: {error.strerror or error}") from None


def _decode(data: bytes, kind: type[T], path: Path) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"data.val_frames: {path} is no list of frames by category and sequence ({error})") from None
