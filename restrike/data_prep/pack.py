"""Image folders to a shard set: one global permutation, parallel, resumable after any kind of end."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from restrike.data.catalogue import CATALOGUE_NAME, Catalogue, Split
from restrike.data.files import sha256_lines, write_atomically
from restrike.data.folder import FolderListing
from restrike.data.index import INDEX_SUFFIX, ShardIndex, index_path
from restrike.data.randomness import Purpose, stream
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.jobs import run_jobs
from restrike.data_prep.progress import Progress
from restrike.data_prep.shard_writer import WORK_FOLDER, BadImage, ShardDone, ShardJob, SourceImage, write_shard

REPORT_NAME = "bad_images.txt"
_IMAGES_PER_WORKER = 2000  # for fewer, starting a process takes longer than the work
_SPLIT_NUMBERS = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class PackOptions:
    """How to pack.

    Attributes:
        name: prefix of the shards' names.
        shards: number of shards per split ("train", "validation"); fewer where a split has fewer images.
        seed: of the permutation.
        workers: processes.
        max_bad: unreadable images that are left out and reported before giving up.
        max_side: shrink larger images to this many pixels and encode them again (not faithful); None = keep bytes.
        check_decode: decode every image once.
    """

    name: str
    shards: dict[str, int]
    seed: int = 0
    workers: int = 1
    max_bad: int = 0
    max_side: int | None = None
    check_decode: bool = True


@dataclass(frozen=True)
class SourceSplit:
    """A split to pack: the folder that its listing is relative to, and the listing."""

    root: Path
    listing: FolderListing


def pack(
    splits: dict[str, SourceSplit], out: Path, options: PackOptions, progress: Progress | None = None
) -> Catalogue:
    """Write shards, indices, catalogue and the report of bad images into `out`.

    Run again after any end, it keeps finished shards and ends with the same bytes as an unbroken run.

    Raises:
        PrepareError: no space, another preparation in `out`, or more than `max_bad` unreadable images.
    """
    jobs = {split: _jobs(split, source, out, options) for split, source in splits.items()}
    total = sum(len(source.listing.paths) for source in splits.values())
    progress = progress or Progress(total, "images")
    (out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    with only_one(out):
        everything = [job for split in jobs.values() for job in split]
        tidy(out, [job.target for job in everything])
        _check_space(out, everything, options)
        done = _run(everything, options, progress)
        classes = splits["train"].listing.classes
        catalogue = Catalogue(
            name=options.name,
            seed=options.seed,
            max_side=options.max_side,
            classes=classes,
            classes_sha256=sha256_lines(classes),
            splits={split: _summary([done[job.target] for job in jobs[split]], out, len(classes)) for split in jobs},
        )
        _write_report(out, [bad for result in done.values() for bad in result.record.bad], total)
        catalogue.save(out / CATALOGUE_NAME)
    return catalogue.sealed()


def _jobs(split: str, source: SourceSplit, out: Path, options: PackOptions) -> list[ShardJob]:
    classes, paths, labels = source.listing
    keys = make_keys(paths)
    images = [
        SourceImage(str(source.root / path), key, label, classes[label], f"{source.root.name}/{path}")
        for path, key, label in zip(paths, keys, labels, strict=True)
    ]
    random = stream(options.seed, Purpose.PACKING, _SPLIT_NUMBERS[split])
    order = np.argsort(random.random(len(images)), kind="stable")
    count = min(options.shards[split], len(images))
    width = max(4 if split == "train" else 2, len(str(count - 1)))
    return [
        ShardJob(
            target=out / f"{options.name}-{split}-{number:0{width}d}.tar",
            images=[images[index] for index in part],
            max_side=options.max_side,
            check_decode=options.check_decode,
        )
        for number, part in enumerate(np.array_split(order, count))
    ]


def make_keys(paths: list[str]) -> list[str]:
    """A unique key for each image: its file's stem, and its row where two images share one.

    Dots end a key in webdataset, so they become underscores; so does anything but letters, digits, `_` and `-`.
    """
    stems = [re.sub(r"[^\w-]", "_", Path(path).stem, flags=re.ASCII) for path in paths]
    seen = Counter(stems)
    keys = [stem if seen[stem] == 1 else f"{stem}-{row:08d}" for row, stem in enumerate(stems)]
    if len(set(keys)) < len(keys):  # somebody's stems end in our row numbers
        keys = [f"{row:08d}-{stem}" for row, stem in enumerate(stems)]
    return keys


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Hold the output folder; a second preparation into it is refused."""
    with open(out / WORK_FOLDER / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"--out: another preparation is writing to {out}") from None
        yield


def tidy(out: Path, targets: Iterable[Path]) -> None:
    """Remove what a killed run left half-done; refuse a folder that holds another set."""
    for partial in [*out.glob("*.partial-*"), *(out / WORK_FOLDER).glob("*.partial-*")]:
        partial.unlink(missing_ok=True)
    expected = {name for target in targets for name in (target.name, index_path(target).name)}
    found = {path.name for path in out.iterdir() if path.suffix in (".tar", INDEX_SUFFIX)}
    if foreign := sorted(found - expected):
        raise PrepareError(
            f"--out: {out} holds shards of another set or another number of shards ({foreign[0]} and "
            f"{len(foreign) - 1} more); choose an empty folder, or delete them"
        )
    (out / CATALOGUE_NAME).unlink(missing_ok=True)  # from here to the end the set is not whole


def _check_space(out: Path, jobs: list[ShardJob], options: PackOptions) -> None:
    """From a sample of the images' sizes: to fail before hours of work and not after."""
    todo = [image for job in jobs if not job.target.exists() for image in job.images]
    if not todo or options.max_side:
        return
    sample = todo[:: max(1, len(todo) // 2000)]
    mean = sum(os.path.getsize(image.path) for image in sample) / len(sample) + 2048
    needed, free = mean * len(todo), shutil.disk_usage(out).free
    if free < needed:
        raise PrepareError(
            f"--out: {out} has {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed; "
            "make room, choose another disk, or give --max-side"
        )


def _run(jobs: list[ShardJob], options: PackOptions, progress: Progress) -> dict[Path, ShardDone]:
    done: dict[Path, ShardDone] = {}
    bad: list[BadImage] = []
    worthwhile = sum(len(job.images) for job in jobs) // _IMAGES_PER_WORKER + 1
    for job, result in run_jobs(write_shard, jobs, min(options.workers, worthwhile)):
        done[job.target] = result
        progress.add(result.images, kept=result.kept)
        bad += result.record.bad
        if len(bad) > options.max_bad:
            _write_report(job.target.parent, bad, None)
            raise PrepareError(
                f"{len(bad)} images cannot be read, --max-bad allows {options.max_bad}; first: "
                f"{bad[0].name}: {bad[0].reason} (all so far: {job.target.parent / REPORT_NAME}). "
                "Mend or remove them, or raise --max-bad"
            )
    return done


def _summary(results: list[ShardDone], out: Path, num_classes: int) -> Split:
    entries = [result.record.entry for result in results if result.record.entry is not None]
    counts = np.zeros(num_classes, dtype=np.int64)
    for entry in entries:
        labels = ShardIndex.load(index_path(out / entry.name)).labels
        counts += np.bincount(labels, minlength=num_classes)
    return Split(samples=sum(entry.samples for entry in entries), class_counts=counts.tolist(), shards=entries)


def _write_report(out: Path, bad: list[BadImage], total: int | None) -> None:
    of = f" of {total}" if total is not None else ", preparation stopped"
    lines = [f"# {len(bad)} unreadable images{of}; left out of the shards", ""]
    lines += sorted(f"{image.name}\t{image.reason}" for image in bad)
    write_atomically(out / REPORT_NAME, ("\n".join(lines).rstrip("\n") + "\n").encode())
