"""Shards of a remote set on this node's disk: one copy for all processes, bounded, least recently used out first.

Each file is fetched under its own lock to a temporary name, verified, and renamed; whoever waited finds it there. A
file that somebody has open stays readable when it is evicted (its inode lives on).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from restrike.data.opener import FetchError, Transfer, fetch, local_path, redact, scheme

_LOCK_TIMEOUT_S = 3600.0


class ShardCache:
    """Files by location.

    Args:
        folder: on a local disk of the node.
        max_bytes: bound for the whole folder; 0 = none. One file more may be there while it is being fetched.
        transfer: how to fetch.
    """

    def __init__(self, folder: Path, max_bytes: int = 0, transfer: Transfer | None = None) -> None:
        self.folder, self.max_bytes, self.transfer = folder, max_bytes, transfer or Transfer()

    def open(self, location: str, expected_bytes: int | None = None, expected_sha256: str | None = None) -> int:
        """A read-only file descriptor of a location; the caller closes it."""
        for _ in range(10):
            path = self.path(location, expected_bytes, expected_sha256)
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # evicted by another process between the two lines
                if path == local_path(location):
                    raise
        raise FetchError(f"{redact(location)}: evicted again and again; raise data.cache_bytes above {self.max_bytes}")

    def path(self, location: str, expected_bytes: int | None = None, expected_sha256: str | None = None) -> Path:
        """Where the file lies on this node; fetched first if it is remote and not yet there.

        Raises:
            FetchError: it cannot be had, or not as expected.
        """
        if scheme(location) == "file":
            return local_path(location)
        path = self.folder / _file_name(location, expected_sha256)
        if _touch(path):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock"), redact(location)):
            if not _touch(path):
                partial = path.with_name(f"{path.name}.partial")
                partial.unlink(missing_ok=True)  # left by a process that was killed; the lock is ours now
                fetch(location, partial, self.transfer, expected_bytes, expected_sha256)
                os.replace(partial, path)
                self._evict(keep=path)
        return path

    def _evict(self, keep: Path) -> None:
        if not self.max_bytes:
            return
        with locked(self.folder / "evict.lock", str(self.folder)):
            files = [(path, path.stat()) for path in self.folder.iterdir() if path.suffix in (".tar", ".idx", ".json")]
            excess = sum(stat.st_size for _, stat in files) - self.max_bytes
            for path, stat in sorted(files, key=lambda item: item[1].st_mtime_ns):
                if excess <= 0:
                    return
                if path != keep:
                    path.unlink(missing_ok=True)
                    excess -= stat.st_size


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock on a file. The system drops it when its holder dies, however it dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise FetchError(f"{what}: another process has held {path} for an hour; is it stuck?") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _touch(path: Path) -> bool:
    """Mark as just used; False where it is absent."""
    with suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False


def _file_name(location: str, sha256: str | None) -> str:
    """By content where that is known (a signed URL changes every day), else by location."""
    digest = sha256 or hashlib.sha256(location.encode()).hexdigest()
    name = redact(location).rstrip("/").rpartition("/")[2] if "://" in location else "pipe.tar"
    return f"{digest[:20]}-{name}"
