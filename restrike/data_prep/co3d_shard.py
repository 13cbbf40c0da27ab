"""Write one multi-view shard: sequences of one category, done whole or again, with the same bytes each time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np

from restrike.data.decode import DecodeError
from restrike.data.files import sha256_lines
from restrike.data.multiview_index import PackedFrame, PackedSequence
from restrike.data_prep.co3d_annotations import FrameAnnotation
from restrike.data_prep.co3d_files import FrameFiles, read_frame
from restrike.data_prep.co3d_splits import read_derived_splits
from restrike.data_prep.co3d_tree import Category, Sequence, read_category
from restrike.data_prep.scene_shard import (
    SHORT_SIDES,
    FramePixels,
    FrameProblem,
    SceneShardRecord,
    keep_or_write,
    pack_frame,
    stamp,
    write_tar,
)

SEQUENCES_PER_SHARD = {"S": 45, "L": 19, "full": 6}  # about 1 GB of CO3D v2
_VERSION = 2  # of what a shard and its index hold: another one packs finished shards again


class SceneShardJob(NamedTuple):
    """One shard to write: sequences of a category, and folders of derived annotations (RayDiffusion's, VGGT's)."""

    target: Path
    root: Path
    category: str
    sequences: tuple[str, ...]
    profile: str
    derived: tuple[tuple[str, Path], ...]


def write_scene_shard(job: SceneShardJob) -> tuple[SceneShardRecord, bool]:
    """Write tar, index and record, or keep what an earlier run had finished (True).

    Raises:
        PrepareError: no space, damaged annotations, or a write that failed.
    """
    cv2.setNumThreads(1)  # processes are the parallelism
    category = _category(job.root, job.category)
    return keep_or_write(
        job.target, lambda: _fingerprint(job, category), lambda fingerprint: _write(job, category, fingerprint)
    )


@lru_cache(maxsize=1)
def _category(root: Path, name: str) -> Category:
    return read_category(root, name)


def _fingerprint(job: SceneShardJob, category: Category) -> str:
    """Of what the shard's bytes follow from; sizes and times stand for the files' content."""
    lines = [f"{_VERSION} {job.profile}"]
    folder = job.root / job.category
    tables = [*sorted(folder.glob("*.jgz")), *sorted((folder / "set_lists").glob("*.json"))]
    tables += [path for _, place in job.derived for path in sorted(place.glob(f"{job.category}_*.jgz"))]
    lines += [stamp(path) for path in tables]
    for name in job.sequences:
        for frame in category.sequences[name].frames:
            assert frame.depth is not None and frame.mask is not None
            paths = [frame.image.path, frame.depth.path, frame.depth.mask_path, frame.mask.path]
            lines += [stamp(job.root / path) for path in paths if path]
    return sha256_lines(lines)


def _write(job: SceneShardJob, category: Category, fingerprint: str) -> SceneShardRecord:
    has_first = next(iter(category.sequences)) in job.sequences
    left_out = list(category.orphans) if has_first else []  # frames of no sequence: told once a category
    without_depth: list[FrameProblem] = []
    frames = redacted = 0
    subsets = category.subsets | read_derived_splits(job.derived, job.category, category)

    def samples() -> Iterator[dict[str, Any]]:
        nonlocal frames, redacted
        for name in job.sequences:
            sequence = category.sequences[name]
            redacted += sequence.redacted
            sample, packed = _pack_sequence(job, sequence, subsets, left_out, without_depth)
            frames += packed
            if packed:
                yield sample

    entry = write_tar(job.target, samples())
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
    pixels = FramePixels(
        files.image_file, files.image, files.depth, files.depth_mask, files.foreground, world_to_camera, intrinsics
    )
    timestamp = frame.frame_timestamp or 0.0
    return pack_frame(frame.frame_number, frame.image.path, timestamp, pixels, SHORT_SIDES[profile])
