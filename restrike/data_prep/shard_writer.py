"""Write one shard: a unit of work that is done whole or again, with the same bytes each time.

Layout of the public timm shard sets (webdataset's TarWriter): per sample `<key>.cls`, `<key>.jpg`, `<key>.json`.
A shard counts as finished when its record exists; the record is written last.
"""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import msgspec

from restrike.data.catalogue import ShardEntry
from restrike.data.decode import DecodeError, decode_rgb
from restrike.data.files import sha256_file, sha256_lines, write_atomically
from restrike.data.index import build_index, index_path
from restrike.data_prep.errors import PrepareError

WORK_FOLDER = ".prepare"
_JPEG_QUALITY = 95


class SourceImage(NamedTuple):
    """An image to pack: file, key in the shard, class, and the name that its `.json` remembers."""

    path: str
    key: str
    label: int
    class_name: str
    name: str


class ShardJob(NamedTuple):
    """One shard to write."""

    target: Path
    images: list[SourceImage]
    max_side: int | None
    check_decode: bool


class BadImage(msgspec.Struct, frozen=True):
    """An image that was left out."""

    name: str
    reason: str


class FinishedRecord(msgspec.Struct, frozen=True):
    """What was finished, from which input. `entry` is None where nothing could be used (there is no tar then)."""

    fingerprint: str
    entry: ShardEntry | None


class ShardRecord(FinishedRecord, frozen=True):
    """A finished shard of images."""

    bad: list[BadImage]


Record = TypeVar("Record", bound=FinishedRecord)


class ShardDone(NamedTuple):
    """Outcome of a job; `kept` = it was finished by an earlier run."""

    record: ShardRecord
    images: int
    kept: bool


def write_shard(job: ShardJob) -> ShardDone:
    """Write tar, index and record of one shard, or keep what an interrupted run had finished.

    Raises:
        PrepareError: no space, or an image of the list has vanished.
    """
    try:
        fingerprint = _fingerprint(job)
        record = finished(job.target, fingerprint, ShardRecord)
        if record is not None:
            return ShardDone(record, len(job.images), kept=True)
        record = _write(job, fingerprint)
        write_atomically(record_path(job.target), msgspec.json.encode(record))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PrepareError(
                f"no space left in {job.target.parent} while writing {job.target.name}; make room and run the same "
                "command again: finished shards are kept"
            ) from error
        raise PrepareError(f"{job.target.name}: {error}") from error
    return ShardDone(record, len(job.images), kept=False)


def record_path(target: Path) -> Path:
    """Where the record of a shard lies."""
    return target.parent / WORK_FOLDER / f"{target.name}.json"


def _fingerprint(job: ShardJob) -> str:
    """Of everything that the shard's bytes follow from; sizes and times stand for the images' content."""
    lines = [f"{job.max_side} {job.check_decode}"]
    for image in job.images:
        stat = os.stat(image.path)
        lines.append(f"{image.key} {image.label} {image.name} {stat.st_size} {stat.st_mtime_ns}")
    return sha256_lines(lines)


def finished(target: Path, fingerprint: str, kind: type[Record]) -> Record | None:
    """The record of a shard that an earlier run has finished from the same input, if the shard is still whole."""
    try:
        record = msgspec.json.decode(record_path(target).read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    if record.fingerprint != fingerprint:
        return None
    if record.entry is not None:
        index = index_path(target)
        whole = target.is_file() and target.stat().st_size == record.entry.bytes and index.is_file()
        if not whole or sha256_file(index) != record.entry.index_sha256:
            return None
    return record


def _write(job: ShardJob, fingerprint: str) -> ShardRecord:
    partial = job.target.with_name(f"{job.target.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            bad = _write_samples(job, file)
            file.flush()
            os.fsync(file.fileno())
        if len(bad) == len(job.images):
            return ShardRecord(fingerprint, None, bad)
        index = build_index(partial)  # reads back what was written
        index.save(index_path(job.target))
        entry = ShardEntry(
            name=job.target.name,
            samples=len(index),
            bytes=index.tar_bytes,
            sha256=sha256_file(partial),
            index_sha256=sha256_file(index_path(job.target)),
        )
        os.replace(partial, job.target)
    finally:
        partial.unlink(missing_ok=True)
    return ShardRecord(fingerprint, entry, bad)


def _write_samples(job: ShardJob, file: BinaryIO) -> list[BadImage]:
    from webdataset import TarWriter  # slow to import

    bad: list[BadImage] = []
    # Nothing of this machine or hour gets in: equal images give equal bytes.
    options = {"user": "restrike", "group": "restrike", "mtime": 0, "compress": False, "encoder": False}
    with TarWriter(file, **options) as writer:
        for image in job.images:
            try:
                data, extension = _prepare(image.path, job)
            except DecodeError as error:
                bad.append(BadImage(image.name, str(error)))
                continue
            about = {"class": image.class_name, "filename": image.name, "label": image.label}
            writer.write(
                {
                    "__key__": image.key,
                    "cls": str(image.label).encode(),
                    extension: data,
                    "json": json.dumps(about, sort_keys=True).encode(),
                }
            )
    return bad


def _prepare(path: str, job: ShardJob) -> tuple[bytes, str]:
    """An image's bytes and extension: as they are, or shrunk where `max_side` asks for it."""
    data = Path(path).read_bytes()
    extension = path.rpartition(".")[2].lower().replace("jpeg", "jpg")
    if not (job.check_decode or job.max_side):
        return data, extension
    pixels = decode_rgb(data)
    if job.max_side is None or max(pixels.shape[:2]) <= job.max_side:
        return data, extension
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((job.max_side, job.max_side), Image.Resampling.BICUBIC, reducing_gap=None)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue(), "jpg"
