"""Write one multi-view shard: sequences of one category, done whole or again, with the same bytes each time."""

from __future__ import annotations

import errno
import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np
from PIL import Image

from restrike.data.catalogue import ShardEntry
from restrike.data.decode import DecodeError
from restrike.data.depth_png import encode_depth, encode_mask_pair
from restrike.data.files import sha256_file, sha256_lines, write_atomically
from restrike.data.index import index_path
from restrike.data.multiview_index import PackedFrame, PackedSequence, build_scene_index
from restrike.data_prep.co3d_annotations import FrameAnnotation
from restrike.data_prep.co3d_files import FrameFiles, read_frame
from restrike.data_prep.co3d_splits import read_derived_splits
from restrike.data_prep.co3d_tree import Category, FrameProblem, Sequence, read_category
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.shard_writer import FinishedRecord, finished, record_path

SHORT_SIDES: dict[str, int | None] = {"S": 384, "L": 640, "full": None}
SEQUENCES_PER_SHARD = {"S": 45, "L": 19, "full": 6}  # about 1 GB of CO3D v2
FOREGROUND_THRESHOLD = 0.4  # RayDiffusion's, for boxes
_JPEG_QUALITY = 95
_VERSION = 1


class SceneShardJob(NamedTuple):
    """One shard to write: sequences of a category, and folders of derived annotations (RayDiffusion's, VGGT's)."""

    target: Path
    root: Path
    category: str
    sequences: tuple[str, ...]
    profile: str
    derived: tuple[tuple[str, Path], ...]


class SceneShardRecord(FinishedRecord, frozen=True):
    """A finished shard of scenes. Problems are (sequence, frame, reason)."""

    frames: int
    redacted: int
    left_out: list[FrameProblem]
    without_depth: list[FrameProblem]


def write_scene_shard(job: SceneShardJob) -> tuple[SceneShardRecord, bool]:
    """Write tar, index and record, or keep what an earlier run had finished (True).

    Raises:
        PrepareError: no space, damaged annotations, or a write that failed.
    """
    cv2.setNumThreads(1)  # processes are the parallelism
    category = _category(job.root, job.category)
    try:
        fingerprint = _fingerprint(job, category)
        record = finished(job.target, fingerprint, SceneShardRecord)
        if record is not None:
            return record, True
        record = _write(job, category, fingerprint)
        write_atomically(record_path(job.target), msgspec.json.encode(record))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PrepareError(
                f"no space left in {job.target.parent} while writing {job.target.name}; make room and run the same "
                "command again: finished shards are kept"
            ) from error
        raise PrepareError(f"{job.target.name}: {error}") from error
    return record, False


@lru_cache(maxsize=1)
def _category(root: Path, name: str) -> Category:
    return read_category(root, name)


def _fingerprint(job: SceneShardJob, category: Category) -> str:
    """Of what the shard's bytes follow from; sizes and times stand for the files' content."""
    lines = [f"{_VERSION} {job.profile}"]
    folder = job.root / job.category
    tables = [*sorted(folder.glob("*.jgz")), *sorted((folder / "set_lists").glob("*.json"))]
    tables += [path for _, place in job.derived for path in sorted(place.glob(f"{job.category}_*.jgz"))]
    lines += [_stamp(path) for path in tables]
    for name in job.sequences:
        for frame in category.sequences[name].frames:
            assert frame.depth is not None and frame.mask is not None
            paths = [frame.image.path, frame.depth.path, frame.depth.mask_path, frame.mask.path]
            lines += [_stamp(job.root / path) for path in paths if path]
    return sha256_lines(lines)


def _stamp(path: Path) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return f"{path.name} missing"
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns}"


def _write(job: SceneShardJob, category: Category, fingerprint: str) -> SceneShardRecord:
    from webdataset import TarWriter  # slow to import

    partial = job.target.with_name(f"{job.target.name}.partial-{os.getpid()}")
    has_first = next(iter(category.sequences)) in job.sequences
    left_out = list(category.orphans) if has_first else []  # frames of no sequence: told once a category
    without_depth: list[FrameProblem] = []
    frames = redacted = 0
    subsets = category.subsets | read_derived_splits(job.derived, job.category, category)
    # Nothing of this machine or hour gets in: equal data give equal bytes.
    options: dict[str, Any] = {"user": "restrike", "group": "restrike", "mtime": 0, "compress": False, "encoder": False}
    try:
        with open(partial, "wb") as file:
            with TarWriter(file, **options) as writer:
                for name in job.sequences:
                    sequence = category.sequences[name]
                    redacted += sequence.redacted
                    sample, packed = _pack_sequence(job, sequence, subsets, left_out, without_depth)
                    frames += packed
                    if packed:
                        writer.write(sample)
            file.flush()
            os.fsync(file.fileno())
        if not frames:
            return SceneShardRecord(fingerprint, None, 0, redacted, left_out, without_depth)
        index = build_scene_index(partial)  # reads back what was written
        index.save(index_path(job.target))
        entry = ShardEntry(
            job.target.name, len(index), index.tar_bytes, sha256_file(partial), sha256_file(index_path(job.target))
        )
        os.replace(partial, job.target)
    finally:
        partial.unlink(missing_ok=True)
    return SceneShardRecord(fingerprint, entry, frames, redacted, left_out, without_depth)


def _pack_sequence(
    job: SceneShardJob,
    sequence: Sequence,
    subsets: dict[str, list[tuple[str, int]]],
    left_out: list[FrameProblem],
    without_depth: list[FrameProblem],
) -> tuple[dict[str, Any], int]:
    """A webdataset sample of the usable frames, and their number; the others are added to the lists."""
    sample: dict[str, Any] = {"__key__": f"{job.category}-{sequence.name}"}
    packed: list[PackedFrame] = []
    problems = list(sequence.problems)
    for row, frame in enumerate(sequence.frames):
        try:
            files = read_frame(job.root, frame)
        except DecodeError as error:
            problems.append(FrameProblem(sequence.name, frame.frame_number, str(error)))
            continue
        about, members = _pack_frame(frame, files, sequence.world_to_camera[row], sequence.intrinsics[row], job.profile)
        if not about.has_depth:
            assert frame.depth is not None
            reason = f"{frame.depth.path}: no depth at all (all 0 or not finite); kept, and left out by require_depth"
            without_depth.append(FrameProblem(sequence.name, frame.frame_number, reason))
        sample |= {f"{len(packed):04d}.{kind}": data for kind, data in members.items()}
        packed.append(about)
    left_out += problems
    rows = {frame.number: row for row, frame in enumerate(packed)}
    own = {
        name: [rows[number] for owner, number in dict.fromkeys(entries) if owner == sequence.name and number in rows]
        for name, entries in subsets.items()
    }
    about_sequence = PackedSequence(
        job.category, sequence.name, sequence.annotation.viewpoint_quality_score, len(problems), sequence.bad_cameras,
        {name: entries for name, entries in own.items() if entries}, packed,
    )  # fmt: skip
    sample["0.seq.json"] = msgspec.json.encode(about_sequence)
    return sample, len(packed)


def _pack_frame(
    frame: FrameAnnotation, files: FrameFiles, world_to_camera: np.ndarray, intrinsics: np.ndarray, profile: str
) -> tuple[PackedFrame, dict[str, bytes]]:
    height, width = files.image.shape[:2]
    size = stored_size((height, width), SHORT_SIDES[profile])
    image_file = files.image_file if size == (height, width) else _shrunk_jpeg(files.image, size)
    depth = _nearest(np.where(np.isfinite(files.depth), files.depth, 0), size)
    depth_mask = _nearest(files.depth_mask.astype(np.uint8), size) > 0
    foreground = files.foreground
    if foreground.shape != size:
        foreground = cv2.resize(foreground, size[::-1], interpolation=cv2.INTER_AREA)
    scale_y, scale_x = size[0] / height, size[1] / width  # pixels count from the image's corner: K scales whole
    about = PackedFrame(
        number=frame.frame_number,
        name=frame.image.path,
        timestamp=frame.frame_timestamp or 0.0,
        original_size=(height, width),
        size=size,
        world_to_camera=world_to_camera.ravel().tolist(),
        intrinsics=(
            float(intrinsics[0, 0] * scale_x), float(intrinsics[1, 1] * scale_y),
            float(intrinsics[0, 2] * scale_x), float(intrinsics[1, 2] * scale_y),
        ),
        box=foreground_box(foreground),
        has_depth=bool((depth > 0).any()),
    )  # fmt: skip
    members = {
        "depth.png": encode_depth(depth),
        "jpg": image_file,
        "mask.png": encode_mask_pair(foreground, depth_mask),
    }
    return about, members


def stored_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(H, W) at which a profile keeps an image: never larger than it is."""
    if short_side is None or min(size) <= short_side:
        return size
    scale = short_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def foreground_box(foreground: np.ndarray) -> tuple[int, int, int, int]:
    """Tight box (left, top, right, bottom), ends exclusive, of uint8 > 0.4 * 255; zeros where there is none."""
    rows, columns = np.nonzero(foreground > 255 * FOREGROUND_THRESHOLD)
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _nearest(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Depth is never averaged: a mean over an edge lies on no surface. Samples at pixel centres."""
    if pixels.shape == size:
        return pixels
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def _shrunk_jpeg(image: np.ndarray, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
