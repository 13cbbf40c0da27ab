"""The checksum of a checkpoint, kept in the file itself.

`torch.save` writes a zip archive, and a zip archive ends with a free comment. The manifest stands there, so that file
and checksum get their name in one rename, and a copy of the file takes its checksum along. Every zip reader skips it.

Manifest: `{"restrike": 2, "sha256": "…"}`, the `TreeDigest` of the archive as it was before the comment was put on; 1
instead of 2 marks older files, whose digest is that of all bytes in one. Files without a manifest (written by somebody
else) are checked by the CRC-32 that the archive holds for each record.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, NamedTuple

NO_COMMENT = b"\x00\x00"  # an archive's last two bytes: the length of an absent comment
PIECE = 1 << 22  # bytes
_MAX_THREADS = 4
_VERSION, _WHOLE = 2, 1
_END_RECORD = b"PK\x05\x06"
_END_RECORD_BYTES = 22
_MAX_COMMENT = 0xFFFF
_UNREADABLE = "unreadable"


class DamagedCheckpointError(ValueError):
    """A checkpoint file that is truncated, altered, or no checkpoint at all."""


class TreeDigest:
    """SHA-256 of the SHA-256 digests of a stream's pieces of 4 MiB, which threads compute side by side.

    One thread digests about as fast as a disk writes; this lets a checkpoint move as fast as the disk. Call `close`
    when done.
    """

    def __init__(self) -> None:
        self._pieces: list[Any] = []
        self._length = 0
        self._last: Future[None] | None = None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads = concurrent.futures.ThreadPoolExecutor(min(cores, _MAX_THREADS), "checkpoint-digest")

    def update(self, data: memoryview) -> list[Future[None]]:
        """Begin to digest the next bytes, which must stay as they are until all of the futures are done."""
        futures: list[Future[None]] = []
        while len(data) > 0:
            start = self._length % PIECE
            if start == 0:
                self._pieces.append(hashlib.sha256())
            elif self._last is not None:
                self._last.result()  # the bytes before these in the piece
            part, data = data[: PIECE - start], data[PIECE - start :]
            self._length += len(part)
            if len(part) < PIECE // 64:  # not worth a thread's attention
                self._pieces[-1].update(part)
            else:
                self._last = self._threads.submit(self._pieces[-1].update, part)
                futures.append(self._last)
        return futures

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(piece.digest() for piece in self._pieces)).hexdigest()

    def close(self) -> None:
        self._threads.shutdown()


def pack(sha256: str, version: int = _VERSION) -> bytes:
    """What replaces `NO_COMMENT` at the end of an archive with that digest."""
    comment = json.dumps({"restrike": version, "sha256": sha256}).encode("ascii")
    return struct.pack("<H", len(comment)) + comment


_COMMENT_BYTES = len(pack("0" * 64)) - len(NO_COMMENT)


class Manifest(NamedTuple):
    """A digest, how it was made, and the length of what it covers, without `NO_COMMENT`."""

    version: int
    sha256: str
    covered: int


def read_manifest(stream: IO[bytes]) -> Manifest | None:
    """Of an archive, or None where there is no manifest. One that can't be read has a digest that matches nothing."""
    size = stream.seek(0, os.SEEK_END)
    tail_start = stream.seek(max(0, size - _END_RECORD_BYTES - _MAX_COMMENT))
    tail = stream.read()
    record = tail.rfind(_END_RECORD)
    comment_start = record + _END_RECORD_BYTES
    if record < 0 or len(tail) < comment_start:
        return None
    comment, covered = tail[comment_start:], tail_start + comment_start - len(NO_COMMENT)
    is_whole = tail[comment_start - len(NO_COMMENT) : comment_start] == struct.pack("<H", len(comment))
    if is_whole and len(comment) != _COMMENT_BYTES:
        return None  # no comment, or somebody else's
    try:
        content = json.loads(comment) if is_whole else {}
        version, digest = content["restrike"], str(content["sha256"])
    except (ValueError, KeyError, TypeError):
        return Manifest(_VERSION, _UNREADABLE, covered)
    is_ours = version in (_WHOLE, _VERSION) and pack(digest, version).endswith(comment)
    return Manifest(version, digest if is_ours else _UNREADABLE, covered)


def verify_stream(stream: IO[bytes], name: str) -> None:
    """Check a whole archive; reads every byte once.

    Raises:
        DamagedCheckpointError: names the file, what is wrong with it, and what to do.
    """
    manifest = read_manifest(stream)
    if manifest is not None:
        if manifest.sha256 != (_sha256 if manifest.version == _WHOLE else _tree_sha256)(stream, manifest.covered):
            raise _damaged(name, "its bytes do not match its own sha256")
        return
    try:
        stream.seek(0)
        with zipfile.ZipFile(stream) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        raise _damaged(name, f"truncated, or not written by torch.save ({error})") from error
    if wrong is not None:
        raise _damaged(name, f"the checksum of its record '{wrong}' is wrong")


def verify(path: str | Path) -> None:
    """`verify_stream` for a local file.

    Raises:
        DamagedCheckpointError: the file is damaged.
        FileNotFoundError: there is none.
    """
    with open(path, "rb") as stream:
        verify_stream(stream, str(path))


def _pieces(stream: IO[bytes], length: int) -> Iterator[bytes]:
    """The first `length` bytes as they were before the manifest was put on."""
    left = length
    stream.seek(0)
    while left > 0 and (piece := stream.read(min(PIECE, left))):
        yield piece
        left -= len(piece)
    yield NO_COMMENT


def _sha256(stream: IO[bytes], length: int) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(stream, length):
        digest.update(piece)
    return digest.hexdigest()


def _tree_sha256(stream: IO[bytes], length: int) -> str:
    digest, waiting = TreeDigest(), collections.deque[Future[None]]()
    try:
        for piece in _pieces(stream, length):
            waiting += digest.update(memoryview(piece))
            if len(waiting) > 2 * _MAX_THREADS:  # each holds a piece
                waiting.popleft().result()
        concurrent.futures.wait(waiting)
        return digest.hexdigest()
    finally:
        digest.close()


def _damaged(name: str, why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint '{name}' is damaged: {why}. Go on from an earlier one, or copy it again")
