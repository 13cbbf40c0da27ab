"""`prepare co3d`: the genuine tree to one multi-view shard set, by category, in parallel, resumable, verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from restrike.data.catalogue import CATALOGUE_NAME
from restrike.data.multiview_index import MultiViewCatalogue
from restrike.data_prep.co3d_annotations import read_sequences
from restrike.data_prep.co3d_shard import SEQUENCES_PER_SHARD, SceneShardJob, write_scene_shard
from restrike.data_prep.co3d_tree import list_categories, read_category
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.pack import only_one, tidy
from restrike.data_prep.progress import Progress
from restrike.data_prep.scene_set import check_space, run_scene_jobs, write_report
from restrike.data_prep.scene_shard import SHORT_SIDES
from restrike.data_prep.shard_writer import WORK_FOLDER

_SAMPLED_FRAMES = 64


@dataclass(frozen=True)
class SceneOptions:
    """How to pack.

    Attributes:
        name: prefix of the shards' names.
        profile: "S" (short side 384, as DUSt3R and CUT3R prepare CO3D), "L" (640, for VGGT at 518), "full".
        categories: of the tree; () = all that it has.
        sequences_per_shard: 0 = about 1 GB of genuine CO3D.
        workers: processes.
        max_bad: frames that are left out and reported before giving up.
        derived: (name, folder) of splits derived by others: ("raydiffusion", …), ("vggt", …).
    """

    name: str = "co3d"
    profile: str = "S"
    categories: tuple[str, ...] = ()
    sequences_per_shard: int = 0
    workers: int = 1
    max_bad: int = 1000
    derived: tuple[tuple[str, Path], ...] = ()


def prepare_co3d(src: Path, out: Path, options: SceneOptions, progress: Progress | None = None) -> MultiViewCatalogue:
    """Write shards, indices, catalogue and the report of bad frames into `out`.

    Run again after any end, it keeps finished shards and ends with the same bytes as an unbroken run.

    Raises:
        PrepareError: no tree, no space, damaged annotations, or more than `max_bad` unusable frames.
    """
    categories = _check(src, out, options)
    jobs = [job for category in categories for job in _jobs(src, out, category, options)]
    if not jobs:
        raise PrepareError(f"--src: the categories of {src} have no sequence")
    (out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    with only_one(out):
        tidy(out, [job.target for job in jobs])
        _forecast(src, out, jobs, options)
        progress = progress or Progress(sum(len(job.sequences) for job in jobs), "sequences")
        records = run_scene_jobs(out, write_scene_shard, jobs, options.workers, options.max_bad, progress)
        entries = [records[job].entry for job in jobs]
        shards = [entry for entry in entries if entry is not None]
        left_out = [problem for job in jobs for problem in records[job].left_out]
        write_report(out, [records[job] for job in jobs], is_whole=True)
        frames = sum(record.frames for record in records.values())
        sequences = sum(shard.samples for shard in shards)
        catalogue = MultiViewCatalogue(
            options.name, options.profile, categories, sequences, frames, len(left_out), shards
        )
        catalogue.save(out / CATALOGUE_NAME)
    return catalogue


def _check(src: Path, out: Path, options: SceneOptions) -> list[str]:
    if options.profile not in SHORT_SIDES:
        raise PrepareError(f"--profile: expected {', '.join(SHORT_SIDES)}, got '{options.profile}'")
    if out.exists() and not out.is_dir():
        raise PrepareError(f"--out: {out} is a file; name a folder")
    found = list_categories(src)
    if out.resolve().is_relative_to(src.resolve()):
        raise PrepareError(f"--out: {out} lies inside the tree; choose a folder outside {src}")
    if missing := sorted(set(options.categories) - set(found)):
        raise PrepareError(f"--categories: {src} has no {', '.join(missing)}; it has {', '.join(found)}")
    for name, folder in options.derived:
        if not folder.is_dir():
            raise PrepareError(f"--{name}-annotations: no folder {folder}")
    return sorted(options.categories) or found


def _jobs(src: Path, out: Path, category: str, options: SceneOptions) -> list[SceneShardJob]:
    names = sorted(entry.sequence_name for entry in read_sequences(src / category / "sequence_annotations.jgz"))
    if bad := [name for name in names if not name.replace("_", "").replace("-", "").isalnum()]:
        raise PrepareError(f"{src / category / 'sequence_annotations.jgz'}: sequence name '{bad[0]}' is no plain name")
    size = options.sequences_per_shard or SEQUENCES_PER_SHARD[options.profile]
    return [
        SceneShardJob(
            target=out / f"{options.name}-{category}-{start // size:04d}.tar",
            root=src,
            category=category,
            sequences=tuple(names[start : start + size]),
            profile=options.profile,
            derived=options.derived,
        )
        for start in range(0, len(names), size)
    ]


def _forecast(src: Path, out: Path, jobs: list[SceneShardJob], options: SceneOptions) -> None:
    """Say how large the set will be, from a sample of the files; fail before hours of work if it cannot fit."""
    todo = [job for job in jobs if not job.target.exists()]
    if not todo:
        return
    category = read_category(src, todo[0].category)
    frames = [frame for sequence in category.sequences.values() for frame in sequence.frames]
    sample = frames[:: max(1, len(frames) // _SAMPLED_FRAMES)]
    short_side = SHORT_SIDES[options.profile]
    total = 0.0
    for frame in sample:
        assert frame.depth is not None and frame.mask is not None
        paths = [src / path for path in (frame.image.path, frame.depth.path, frame.mask.path)]
        share = 1.0 if short_side is None else min(1.0, (short_side / min(frame.image.size)) ** 2)
        total += share * sum(path.stat().st_size for path in paths if path.is_file()) + 3 * 1024
    if not sample:
        return
    per_sequence = total / len(sample) * len(frames) / len(category.sequences)
    needed = per_sequence * sum(len(job.sequences) for job in todo)
    check_space(out, needed, options.profile)
