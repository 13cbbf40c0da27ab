"""Checkpoint files that are whole or not there.

A save streams into `<name>.tmp-<pid>` beside the target, reaches the disk, and only then takes its name. Wherever the
process or the machine stops, the target is the old file or the new one. An overwritten file stays as
`<stem>-previous<suffix>`, in case the disk returns the new one damaged.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import glob
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from restrike.checkpoints.manifest import NO_COMMENT, PIECE, DamagedCheckpointError, TreeDigest, pack, verify

_log = logging.getLogger(__name__)
_TEMPORARY = re.compile(r"\.tmp-(\d+)$")
_WRITEBACK_BYTES = 1 << 25

# Every step of a save, in order; "writing" comes once a record.
FAILPOINTS = ("opened", "writing", "written", "synced", "kept previous", "renamed", "done")


def failpoint(name: str) -> None:
    """Does nothing. Tests replace it by something that kills the process or fails at one of `FAILPOINTS`."""


class DigestingWriter:
    """Passes an archive on to `stream` and puts the manifest on its end. No copy of the data is made.

    Other threads compute the digest while pieces are written, and a local file is sent to the disk as it grows: the
    kernel alone would begin so late that a gigabyte takes two to four times as long to be durable.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = TreeDigest()
        self._tail = b""  # the last two bytes so far: at the end they have to be replaced
        self._descriptor = _local_descriptor(stream)
        self._written = self._sent = 0

    def write(self, data: Any) -> int:
        failpoint("writing")
        view = memoryview(data).cast("B")
        self._put(memoryview(self._tail))
        self._put(view[:-2])
        self._tail = bytes(view[-2:])
        return len(view)

    def _put(self, view: memoryview) -> None:
        digested = self._digest.update(view)
        try:
            for start in range(0, len(view), PIECE):
                piece = view[start : start + PIECE]
                self._stream.write(piece)
                self._written += len(piece)
                self._send()
        finally:
            concurrent.futures.wait(digested)  # the caller may change its memory once we return

    def _send(self) -> None:
        """Begin to move to the disk what was written since the last time."""
        length = self._written - self._sent
        if self._descriptor is not None and length >= _WRITEBACK_BYTES:
            # Pages that are not on the disk yet are not dropped by this, they are queued for writing.
            os.posix_fadvise(self._descriptor, self._sent, length, os.POSIX_FADV_DONTNEED)
            self._sent = self._written

    def flush(self) -> None:
        self._stream.flush()

    def finish(self) -> None:
        """Write what is held back, with the manifest."""
        concurrent.futures.wait(self._digest.update(memoryview(self._tail)))
        self._digest.close()
        ends_without_comment = self._tail == NO_COMMENT
        self._stream.write(pack(self._digest.hexdigest()) if ends_without_comment else self._tail)


def _local_descriptor(stream: IO[bytes]) -> int | None:
    """Of a file on this machine; None for what is none, and where the system takes no advice."""
    if not hasattr(os, "posix_fadvise"):
        return None
    with contextlib.suppress(AttributeError, OSError):  # io.UnsupportedOperation is one
        return stream.fileno()
    return None


def write_archive(content: Any, stream: IO[bytes], with_crc32: bool = False) -> None:
    """`torch.save` to a stream, with the manifest.

    Args:
        content: What `torch.save` takes.
        stream: Is written to from its beginning.
        with_crc32: Compute the archive's own checksums, too: zip programs want them and torch does not read them. They
            take a fifth of the time of a save.
    """
    writer: Any = DigestingWriter(stream)  # has what torch.save uses of a stream
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(with_crc32)
    try:
        torch.save(content, writer)
    finally:
        torch.serialization.set_crc32_options(before)
    writer.finish()


def save(content: Any, path: str | Path, keep_previous: bool = True, with_crc32: bool = False) -> None:
    """`write_archive` to a local file, atomically and durably.

    Args:
        content: What `torch.save` takes.
        path: Target; its folder is made where it is missing.
        keep_previous: Keep a file of that name as `previous_path(path)`.
        with_crc32: For a file that leaves the project: see `write_archive`.

    Raises:
        OSError: the disk is full or not writable. The old file is untouched and the temporary one removed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target.parent, target.name)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            failpoint("opened")
            write_archive(content, stream, with_crc32)
            failpoint("written")
            stream.flush()
            os.fsync(stream.fileno())
        failpoint("synced")
        _put_in_place(temporary, target, keep_previous)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(cause := error.__context__, OSError):
            raise cause from None  # torch's writer reports the failed write as its own error
        raise


def link(source: str | Path, target: str | Path, keep_previous: bool = True) -> None:
    """Give a saved file a second name, as `save` would have written it there; costs nothing on most file systems.

    Raises:
        OSError: the file system has no hard links.
    """
    target = Path(target)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    _put_in_place(temporary, target, keep_previous)


def previous_path(path: str | Path) -> Path:
    """Where the file lies that a save to `path` replaced."""
    return Path(path).with_stem(f"{Path(path).stem}-previous")


def newest_valid(
    folder: str | Path, pattern: str = "*.ckpt", report: Callable[[str], None] = _log.warning
) -> Path | None:
    """The most recently written checkpoint that is whole, or None. Reads the files that it judges.

    Args:
        folder: Where to look; it may be missing.
        pattern: Glob of file names.
        report: Called with one sentence for every file that is passed over.
    """
    files = [file for file in Path(folder).glob(pattern) if file.is_file() and not _TEMPORARY.search(file.name)]
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True):
        try:
            verify(file)
            return file
        except (DamagedCheckpointError, OSError) as error:
            report(f"passing over a checkpoint: {error}")
    return None


def remove_stale(folder: str | Path, name: str = "") -> list[Path]:
    """Remove what killed saves to files named `name…` left behind; a running process's file stays.

    Returns:
        The removed files.
    """
    removed = []
    for file in Path(folder).glob(f"{glob.escape(name)}*.tmp-*"):
        found = _TEMPORARY.search(file.name)
        if found and not _is_running(int(found.group(1))):
            file.unlink(missing_ok=True)
            removed.append(file)
    return removed


def _put_in_place(temporary: Path, target: Path, keep_previous: bool) -> None:
    if keep_previous and target.exists():
        _keep(target)
    failpoint("kept previous")
    _rename(temporary, target)
    failpoint("renamed")
    _sync_folder(target.parent)
    failpoint("done")


def _keep(target: Path) -> None:
    previous = previous_path(target)
    second_name = previous.with_name(f"{previous.name}.tmp-{os.getpid()}")
    try:
        second_name.unlink(missing_ok=True)
        os.link(target, second_name)
        _rename(second_name, previous)
    except OSError:  # no hard links here: for a moment only the previous name exists, which `newest_valid` finds
        second_name.unlink(missing_ok=True)
        os.replace(target, previous)


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)
    source.unlink(missing_ok=True)  # renaming does nothing where both are already names of one file


def _sync_folder(folder: Path) -> None:
    with _descriptor(folder) as descriptor, contextlib.suppress(OSError):  # some network file systems can't
        os.fsync(descriptor)


@contextlib.contextmanager
def _descriptor(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # ours, from an earlier save
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
