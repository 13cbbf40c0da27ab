"""Check a shard set against its catalogue, byte by byte, and name what is damaged."""

from __future__ import annotations

import itertools
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from restrike.data.catalogue import CATALOGUE_NAME, ShardEntry, load_catalogue
from restrike.data.decode import DecodeError, decode_rgb
from restrike.data.files import sha256_file
from restrike.data.index import ShardIndex, index_path
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.progress import Progress


def verify(data: Path, workers: int = 1, decode: bool = False, progress: Progress | None = None) -> list[str]:
    """Compare every file of a set with the catalogue's lengths, hashes and counts.

    Args:
        data: folder of a prepared set.
        workers: threads.
        decode: decode every image too.
        progress: default one line on standard error.

    Returns:
        One sentence for each problem, with the shard, and with the sample where a flipped byte can be pinned down.

    Raises:
        PrepareError: no set there.
    """
    path = data / CATALOGUE_NAME
    if not path.is_file():
        raise PrepareError(f"--data: no {CATALOGUE_NAME} in {data}; is this a folder that `prepare` finished?")
    try:
        catalogue = load_catalogue(path)
    except ValueError as error:
        return [str(error)]
    entries = [entry for split in catalogue.splits.values() for entry in split.shards]
    progress = progress or Progress(sum(entry.samples for entry in entries), "images")
    problems: list[str] = []

    with ThreadPoolExecutor(workers) as pool:
        for entry, found in zip(entries, pool.map(lambda e: _verify_shard(data, e, decode), entries), strict=True):
            progress.add(entry.samples)
            problems += found
    if not problems:
        for name, split in catalogue.splits.items():
            labels = np.concatenate([ShardIndex.load(index_path(data / entry.name)).labels for entry in split.shards])
            if np.bincount(labels, minlength=len(catalogue.classes)).tolist() != split.class_counts:
                problems.append(f"split '{name}': labels in the shards do not add up to the catalogue's class counts")
    return problems


def _verify_shard(data: Path, entry: ShardEntry, decode: bool) -> list[str]:
    tar, sidecar = data / entry.name, index_path(data / entry.name)
    missing = [f"{path.name}: missing" for path in (tar, sidecar) if not path.is_file()]
    if missing:
        return missing
    problems = []
    if sha256_file(sidecar) != entry.index_sha256:
        problems.append(f"{sidecar.name}: sha256 differs from the catalogue's")
    if tar.stat().st_size != entry.bytes:
        problems.append(f"{tar.name}: {tar.stat().st_size} bytes, the catalogue says {entry.bytes}")
    elif sha256_file(tar) != entry.sha256:
        where = "" if problems else pin_down(tar, ShardIndex.load(sidecar))
        problems.append(f"{tar.name}: sha256 differs from the catalogue's{where}")
    if decode and not problems:
        problems = _undecodable(tar, ShardIndex.load(sidecar))
    return problems


def pin_down(tar: Path, index: ShardIndex) -> str:
    """Which samples the damage lies in."""
    keys = []
    with open(tar, "rb") as file:
        for row, (start, end) in enumerate(itertools.pairwise(index.starts.tolist())):
            if zlib.crc32(os.pread(file.fileno(), end - start, start)) != index.crc32[row]:
                keys.append(index.key(row))
    if not keys:
        return " (behind the last sample)"
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f" in sample {', '.join(repr(key) for key in keys[:5])}{more}"


def _undecodable(tar: Path, index: ShardIndex) -> list[str]:
    problems = []
    with open(tar, "rb") as file:
        for row in range(len(index)):
            try:
                decode_rgb(os.pread(file.fileno(), int(index.sizes[row]), int(index.offsets[row])))
            except DecodeError as error:
                problems.append(f"{tar.name}: sample '{index.key(row)}' cannot be decoded: {error}")
    return problems
