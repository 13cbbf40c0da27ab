"""New files that are whole or not there, and never in the place of others."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from restrike.export.errors import ExportError


def check_target(path: Path) -> None:
    """Say at once, before anything is computed, that nothing can be written there.

    Raises:
        ExportError: something is there already, or the folder cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise ExportError(f"{path} exists, and export never overwrites: give another name, or remove it first")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ExportError(f"{path} cannot be written: {existing} is no folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ExportError(f"{path} cannot be written: no permission in {existing}")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well, and is gone when it fails.

    Raises:
        ExportError: see `check_target`; also where a file fails to be written.
    """
    check_target(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        check_target(path)  # again: somebody else may have been quicker
        os.rename(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise ExportError(f"{path} was not written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write one file to, which becomes `path` when the block ends well.

    The file is written under its own name in a folder beside the target; files that a writer puts next to it (ONNX
    keeps tensors beyond 2 GB in one) come along, and get their place before it does.

    Raises:
        ExportError: as `new_folder`.
    """
    check_target(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary / path.name
        files = sorted(temporary.iterdir(), key=lambda file: file.name == path.name)
        for file in files:
            _sync(file)
            check_target(path.with_name(file.name))  # again: somebody else may have been quicker
        for file in files:
            os.rename(file, path.with_name(file.name))
        _sync(path.parent)
    except OSError as error:
        raise ExportError(f"{path} was not written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    """To the disk, with the permissions that new files of this process have."""
    if path.is_file():
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)  # safetensors writes for the owner alone
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
