"""The checksum of a checkpoint, kept in the file itself.

`torch.save` writes a zip archive, and a zip archive ends with a free comment. The manifest stands there, so that file
and checksum get their name in one rename, and a copy of the file takes its checksum along. Every zip reader skips it.

Manifest: `{"restrike": 1, "sha256": "…"}`, the digest of the archive as it was before the comment was put on.
Files without one (written by somebody else) are checked by the CRC-32 that the archive holds for each record.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

NO_COMMENT = b"\x00\x00"  # an archive's last two bytes: the length of an absent comment
_CHUNK = 1 << 22
_END_RECORD = b"PK\x05\x06"
_END_RECORD_BYTES = 22
_MAX_COMMENT = 0xFFFF
_UNREADABLE = "unreadable"


class DamagedCheckpointError(ValueError):
    """A checkpoint file that is truncated, altered, or no checkpoint at all."""


def pack(sha256: str) -> bytes:
    """What replaces `NO_COMMENT` at the end of an archive with that digest."""
    comment = json.dumps({"restrike": 1, "sha256": sha256}).encode("ascii")
    return struct.pack("<H", len(comment)) + comment


_COMMENT_BYTES = len(pack("0" * 64)) - len(NO_COMMENT)


def read_manifest(stream: IO[bytes]) -> tuple[str, int] | None:
    """(sha256, length of what it covers without `NO_COMMENT`) of an archive, or None where there is no manifest.

    A manifest that can't be read gives a digest that matches nothing.
    """
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
        digest = str(json.loads(comment)["sha256"]) if is_whole else ""
    except (ValueError, KeyError, TypeError):
        digest = ""
    return (digest if pack(digest).endswith(comment) else _UNREADABLE), covered


def verify_stream(stream: IO[bytes], name: str) -> None:
    """Check a whole archive; reads every byte once.

    Raises:
        DamagedCheckpointError: names the file, what is wrong with it, and what to do.
    """
    manifest = read_manifest(stream)
    if manifest is not None:
        if manifest[0] != _sha256(stream, manifest[1]):
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


def _sha256(stream: IO[bytes], length: int) -> str:
    digest, left = hashlib.sha256(), length
    stream.seek(0)
    while left > 0 and (chunk := stream.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    digest.update(NO_COMMENT)
    return digest.hexdigest()


def _damaged(name: str, why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint '{name}' is damaged: {why}. Go on from an earlier one, or copy it again")
