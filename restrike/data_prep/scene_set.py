"""What every packer of multi-view sets shares: run the shards, bound and report bad frames, write the catalogue."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from restrike.data.files import write_atomically
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.jobs import run_jobs
from restrike.data_prep.progress import Progress
from restrike.data_prep.scene_shard import FrameProblem, SceneShardRecord

REPORT_NAME = "bad_frames.txt"


class ShardJob(Protocol):
    """A shard to write, of some sequences."""

    @property
    def target(self) -> Path: ...

    @property
    def sequences(self) -> tuple[str, ...]: ...


J = TypeVar("J", bound=ShardJob)


def run_scene_jobs(
    out: Path,
    work: Callable[[J], tuple[SceneShardRecord, bool]],
    jobs: list[J],
    workers: int,
    max_bad: int,
    progress: Progress,
) -> dict[J, SceneShardRecord]:
    """Write every shard.

    Raises:
        PrepareError: more than `max_bad` frames cannot be used; names the first, and the report that names all.
    """
    records: dict[J, SceneShardRecord] = {}
    for job, (record, kept) in run_jobs(work, jobs, workers):
        records[job] = record
        progress.add(len(job.sequences), kept=kept)
        left_out = [problem for one in records.values() for problem in one.left_out]
        if len(left_out) > max_bad:
            write_report(out, records.values(), is_whole=False)
            raise PrepareError(
                f"{len(left_out)} frames cannot be used, --max-bad allows {max_bad}; first: {left_out[0]} "
                f"(all so far: {out / REPORT_NAME}). Fetch them again, or raise --max-bad"
            )
    return records


def check_space(out: Path, needed: float, profile: str) -> None:
    """Say how large the set will be. Raises PrepareError: more bytes than are free, before hours of work."""
    free = shutil.disk_usage(out).free
    text = f"about {needed / 1e9:.2f} GB to write (profile {profile}), {free / 1e9:.1f} GB free"
    if free < needed:
        raise PrepareError(f"--out: {out}: {text}; make room, choose another disk or a smaller --profile")
    print(text, file=sys.stderr)


def write_report(out: Path, records: Iterable[SceneShardRecord], is_whole: bool) -> None:
    """Name every frame that was left out or has no depth."""
    records = list(records)
    frames, redacted = (sum(getattr(record, name) for record in records) for name in ("frames", "redacted"))
    left_out = sorted(problem for record in records for problem in record.left_out)
    without = sorted(problem for record in records for problem in record.without_depth)
    end = "" if is_whole else "; preparation stopped"
    lines = [
        f"# {frames} frames packed; {len(left_out)} left out, {len(without)} kept without depth, {redacted} redacted "
        f"by the data set{end}",
        *_lines("left out", left_out),
        *_lines("without depth", without),
    ]
    write_atomically(out / REPORT_NAME, ("\n".join(lines) + "\n").encode())


def _lines(kind: str, problems: list[FrameProblem]) -> list[str]:
    return [f"{kind}\t{problem}" for problem in problems]


def bad_frame_counts(out: Path) -> str:
    """The first line of the report of a set."""
    return (out / REPORT_NAME).read_text().splitlines()[0].removeprefix("# ")
