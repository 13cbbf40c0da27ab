"""Finding the shards of a set and their indices: local or remote, with a catalogue or (foreign sets) without."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from restrike.data.cache import ShardCache, locked
from restrike.data.catalogue import CATALOGUE_NAME, Catalogue, load_catalogue
from restrike.data.files import sha256_file
from restrike.data.index import INDEX_SUFFIX, ShardIndex, build_index, index_path
from restrike.data.opener import fetch, join, local_path, redact, scheme

_LOG = logging.getLogger(__name__)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_INDEX_THREADS = 16


@dataclass(frozen=True)
class ShardFile:
    """A shard's location (path or URL) and, where a catalogue tells them, length and hashes."""

    location: str
    bytes: int | None = None
    sha256: str | None = None
    index_sha256: str | None = None

    @property
    def name(self) -> str:
        return redact(self.location).rstrip("/").rpartition("/")[2]


def expand_braces(pattern: str) -> list[str]:
    """`x-{000..002}.tar` → x-000.tar, x-001.tar, x-002.tar; several ranges multiply."""
    parts = _RANGE.split(pattern)
    if len(parts) == 1:
        return [pattern]
    ranges = [
        [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    texts = parts[0::3]
    return [
        "".join(itertools.chain(*itertools.zip_longest(texts, numbers, fillvalue="")))
        for numbers in itertools.product(*ranges)
    ]


def read_catalogue(data: str, cache: ShardCache) -> Catalogue | None:
    """The catalogue of a set; None for a local folder of shards without one.

    Raises:
        FetchError, ValueError: it cannot be fetched (remote), or is damaged.
    """
    if scheme(data) == "pipe":
        return None
    location = join(data, CATALOGUE_NAME)
    if scheme(data) == "file":
        path = Path(location)
        return load_catalogue(path) if path.is_file() else None
    # Never from the cache: a remote set may have been made again, and its shards are cached by content.
    cache.folder.mkdir(parents=True, exist_ok=True)
    path = cache.folder / f"catalogue-{os.getpid()}.partial"
    try:
        fetch(location, path, cache.transfer)
        return load_catalogue(path, redact(location))
    finally:
        path.unlink(missing_ok=True)


def shards_of_split(data: str, catalogue: Catalogue, split: str) -> list[ShardFile]:
    """The shards that a catalogue lists.

    Raises:
        ValueError: no such split.
    """
    if split not in catalogue.splits:
        known = ", ".join(f"'{name}'" for name in catalogue.splits)
        raise ValueError(f"data.data: {redact(data)} has no split '{split}'; it has {known}")
    return [
        ShardFile(join(data, shard.name), shard.bytes, shard.sha256, shard.index_sha256)
        for shard in catalogue.splits[split].shards
    ]


def shards_of_pattern(data: str, pattern: str, setting: str) -> list[ShardFile]:
    """Shards by name: brace ranges, and `*` in local folders; relative names lie in `data`.

    Raises:
        ValueError: nothing matches.
    """
    found: list[ShardFile] = []
    for name in expand_braces(pattern):
        absolute = scheme(name) != "file" or name.startswith(("/", "~", "file:"))
        location = name if absolute else join(data, name)
        if scheme(location) == "file" and "*" in location:
            path = local_path(location)
            found += [ShardFile(str(match)) for match in sorted(path.parent.glob(path.name))]
        else:
            found.append(ShardFile(location))
    if not found:
        raise ValueError(f"{setting}: no shard matches '{redact(pattern)}' in {redact(data)}")
    return found


def load_indices(files: list[ShardFile], cache: ShardCache) -> list[ShardIndex]:
    """The index of every shard. Missing sidecars are built once: that reads (and first fetches) the shard.

    Raises:
        ValueError: a shard is missing, truncated or damaged; every such shard of the set is counted, the first named.
    """
    problems: list[str] = []

    def load(file: ShardFile) -> ShardIndex | None:
        try:
            return _load_index(file, cache)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            return None

    # Remote ones wait for their bytes, one by one; local ones would wait for each other, so a thread takes many.
    batch = 1 if any(scheme(file.location) != "file" for file in files) else -(-len(files) // _INDEX_THREADS)
    batches = [files[first : first + batch] for first in range(0, len(files), batch)]
    with ThreadPoolExecutor(_INDEX_THREADS) as pool:
        found = itertools.chain.from_iterable(pool.map(lambda part: [load(file) for file in part], batches))
        indices = [index for index in found if index is not None]
    if problems:
        more = f" (and {len(problems) - 1} more of {len(files)} shards)" if len(problems) > 1 else ""
        raise ValueError(f"{min(problems)}{more}")
    return indices


def _load_index(file: ShardFile, cache: ShardCache) -> ShardIndex:
    if scheme(file.location) == "file":
        return _load_local_index(local_path(file.location), file, cache)
    if file.index_sha256 is not None:
        location = re.sub(r"\.tar(?=$|\?|#)", INDEX_SUFFIX, file.location)
        return ShardIndex.load(cache.path(location, None, file.index_sha256))
    tar = cache.path(file.location)
    return _built_once(index_path(tar), tar)


def _load_local_index(tar: Path, file: ShardFile, cache: ShardCache) -> ShardIndex:
    mend = "fetch or prepare this shard again"
    if not tar.is_file():
        raise ValueError(f"shard {tar} is missing; {mend}")
    size = tar.stat().st_size
    if file.bytes is not None and size != file.bytes:
        raise ValueError(f"shard {tar} has {size} bytes, its catalogue says {file.bytes} (truncated?); {mend}")
    beside = index_path(tar)
    if file.bytes is None and not beside.is_file() and not os.access(tar.parent, os.W_OK):
        digest = hashlib.sha256(str(tar.resolve()).encode()).hexdigest()[:20]
        beside = cache.folder / f"{digest}-{beside.name}"
    if file.bytes is not None and not beside.is_file():
        raise ValueError(f"index {beside} is missing; {mend}")
    if file.index_sha256 is not None and sha256_file(beside) != file.index_sha256:
        raise ValueError(f"index {beside} is not the one that the catalogue lists; {mend}")
    index = _built_once(beside, tar)
    if index.tar_bytes != size:
        raise ValueError(
            f"shard {tar} has {size} bytes, its index says {index.tar_bytes} (truncated?); {mend}, "
            f"or delete {beside} if the shard was replaced"
        )
    return index


def _built_once(path: Path, tar: Path) -> ShardIndex:
    """Load, or build and save; of several processes one builds."""
    if path.is_file():
        return ShardIndex.load(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock")
    with locked(lock, str(path)):
        if not path.is_file():
            _LOG.info("indexing %s (once)", tar)
            build_index(tar).save(path)
    lock.unlink(missing_ok=True)
    return ShardIndex.load(path)
