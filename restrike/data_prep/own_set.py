"""`prepare scenes`: one's own scenes to the same shard set as CO3D, in parallel, resumable, verified."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import msgspec

from restrike.data.catalogue import CATALOGUE_NAME
from restrike.data.decode import DecodeError
from restrike.data.files import sha256_lines
from restrike.data.multiview_index import MultiViewCatalogue, PackedFrame, PackedSequence
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.own_frames import DepthFile, OwnScene, read_pixels
from restrike.data_prep.own_scenes import LAYOUTS, PARTS, SUBSET, ReadOptions, find_scenes, read_scene, scene_name
from restrike.data_prep.pack import only_one, tidy
from restrike.data_prep.progress import Progress
from restrike.data_prep.scene_set import check_space, run_scene_jobs, write_report
from restrike.data_prep.scene_shard import (
    SHORT_SIDES,
    FrameProblem,
    SceneShardRecord,
    keep_or_write,
    pack_frame,
    stamp,
    write_tar,
)
from restrike.data_prep.shard_writer import WORK_FOLDER

_VERSION = 1  # of what a shard and its index hold: another one packs finished shards again
_FRAME_BYTES = {"S": 140e3, "L": 330e3, "full": 950e3}  # with dense depth


@dataclass(frozen=True)
class OwnSetOptions:
    """How to pack.

    Attributes:
        name: prefix of the shards' names.
        category: of all scenes, for `filter.categories`.
        profile: "S" (short side 384), "L" (640), "full".
        read: layout, units and splits.
        scenes_per_shard: so many.
        workers: processes, a shard each.
        max_bad: frames that are left out and reported before giving up.
    """

    name: str = "scenes"
    category: str = "own"
    profile: str = "S"
    read: ReadOptions = field(default_factory=ReadOptions)
    scenes_per_shard: int = 8
    workers: int = 1
    max_bad: int = 10


class _Job(NamedTuple):
    target: Path
    folders: tuple[Path, ...]
    options: OwnSetOptions

    @property
    def sequences(self) -> tuple[str, ...]:
        return tuple(scene_name(folder) for folder in self.folders)


def prepare_scenes(
    src: Path, out: Path, options: OwnSetOptions, progress: Progress | None = None
) -> MultiViewCatalogue:
    """Write shards, indices, catalogue and the report of bad frames into `out`; the subsets are "own/train", "own/val".

    Run again after any end, it keeps finished shards and ends with the same bytes as an unbroken run.

    Raises:
        PrepareError: no scene, a damaged one, no space, or more than `max_bad` unusable frames.
    """
    folders = _check(src, out, options)
    scenes = [read_scene(folder, options.read) for folder in folders]  # all mistakes in cameras are said at once
    size = options.scenes_per_shard
    jobs = [
        _Job(out / f"{options.name}-{start // size:04d}.tar", tuple(folders[start : start + size]), options)
        for start in range(0, len(folders), size)
    ]
    (out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    with only_one(out):
        tidy(out, [job.target for job in jobs])
        todo = {folder for job in jobs if not job.target.exists() for folder in job.folders}
        frames = sum(len(scene.frames) for scene in scenes if scene.root in todo)
        if frames:
            check_space(out, frames * _FRAME_BYTES[options.profile], options.profile)
        progress = progress or Progress(len(scenes), "scenes")
        records = run_scene_jobs(out, _write_shard, jobs, options.workers, options.max_bad, progress)
        done = [records[job] for job in jobs]
        write_report(out, done, is_whole=True)
        shards = [record.entry for record in done if record.entry is not None]
        if not shards:
            raise PrepareError(f"--src: no frame of {src} can be used; {out / 'bad_frames.txt'} says why")
        catalogue = MultiViewCatalogue(
            options.name,
            options.profile,
            [options.category],
            sum(shard.samples for shard in shards),
            sum(record.frames for record in done),
            sum(len(record.left_out) for record in done),
            shards,
        )
        catalogue.save(out / CATALOGUE_NAME)
    return catalogue


def _check(src: Path, out: Path, options: OwnSetOptions) -> list[Path]:
    if options.profile not in SHORT_SIDES:
        raise PrepareError(f"--profile: expected {', '.join(SHORT_SIDES)}, got '{options.profile}'")
    if options.read.layout not in LAYOUTS:
        raise PrepareError(f"--layout: expected {', '.join(LAYOUTS)}, got '{options.read.layout}'")
    if not options.read.scale > 0 or not options.read.depth_unit > 0:
        raise PrepareError(
            f"--scale, --depth-unit: expected numbers above 0, got {options.read.scale} and {options.read.depth_unit}"
        )
    if out.exists() and not out.is_dir():
        raise PrepareError(f"--out: {out} is a file; name a folder")
    folders = [src] if options.read.layout != "auto" and src.is_dir() and not _holds_scenes(src) else find_scenes(src)
    if any(out.resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise PrepareError(f"--out: {out} lies inside the scenes; choose a folder outside {src}")
    names = [scene_name(folder) for folder in folders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PrepareError(f"--src: two scenes of {src} would be called '{twice[0]}'; rename one")
    if unknown := sorted(set(options.read.val_scenes) - set(names)):
        raise PrepareError(f"--val-scenes: {src} has no '{unknown[0]}'; it has {', '.join(names)}")
    return folders


def _holds_scenes(src: Path) -> bool:
    try:
        return bool(find_scenes(src))
    except PrepareError:
        return False


def _write_shard(job: _Job) -> tuple[SceneShardRecord, bool]:
    """Write tar, index and record, or keep what an earlier run had finished (True)."""
    cv2.setNumThreads(1)  # processes are the parallelism
    scenes = [read_scene(folder, job.options.read) for folder in job.folders]
    return keep_or_write(job.target, lambda: _fingerprint(job, scenes), lambda mark: _write(job, scenes, mark))


def _fingerprint(job: _Job, scenes: list[OwnScene]) -> str:
    options = job.options
    lines = [f"{_VERSION} {options.profile} {options.category} {options.read}"]
    for scene in scenes:
        lines += [f"{scene.name} {scene.layout}", *(stamp(path) for path in scene.files)]
        for frame in scene.frames:
            depth = frame.depth.path if isinstance(frame.depth, DepthFile) else None
            lines += [stamp(scene.root / path) for path in (frame.path, depth, frame.mask) if path]
    return sha256_lines(lines)


def _write(job: _Job, scenes: list[OwnScene], fingerprint: str) -> SceneShardRecord:
    left_out: list[FrameProblem] = []
    without_depth: list[FrameProblem] = []
    frames = 0

    def samples() -> Iterator[dict[str, Any]]:
        nonlocal frames
        for scene in scenes:
            sample, packed = _pack_scene(scene, job.options, left_out, without_depth)
            frames += packed
            if packed:
                yield sample

    entry = write_tar(job.target, samples())
    return SceneShardRecord(fingerprint, entry, frames, 0, left_out, without_depth)


def _pack_scene(
    scene: OwnScene, options: OwnSetOptions, left_out: list[FrameProblem], without_depth: list[FrameProblem]
) -> tuple[dict[str, Any], int]:
    """A webdataset sample of the usable frames, and their number; the others are added to the lists."""
    sample: dict[str, Any] = {"__key__": f"{options.category}-{scene.name}"}
    packed: list[PackedFrame] = []
    subsets: dict[str, list[int]] = {f"{SUBSET}/{part}": [] for part in PARTS}
    problems: list[FrameProblem] = []
    short_side = SHORT_SIDES[options.profile]
    for number, frame in enumerate(scene.frames):
        try:
            pixels = read_pixels(scene, frame, short_side, options.read.scale)
        except DecodeError as error:
            problems.append(FrameProblem(scene.name, number, str(error)))
            continue
        about, members = pack_frame(number, f"{scene.name}/{frame.path}", float(number), pixels, short_side)
        if not about.has_depth:
            without_depth.append(FrameProblem(scene.name, number, f"{frame.path}: no depth"))
        subsets[f"{SUBSET}/{frame.part}"].append(len(packed))
        sample |= {f"{len(packed):04d}.{kind}": data for kind, data in members.items()}
        packed.append(about)
    left_out += problems
    subsets = {name: rows for name, rows in subsets.items() if rows}
    about_scene = PackedSequence(options.category, scene.name, None, len(problems), 0, subsets, packed)
    sample["0.seq.json"] = msgspec.json.encode(about_scene)
    return sample, len(packed)
