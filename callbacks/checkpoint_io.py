"""How Lightning's checkpoints reach the disk and come back: whole, checked, and without running code from them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from restrike.checkpoints import atomic, safe_load


class AtomicCheckpointIO(CheckpointIO):
    """Saves through `restrike.checkpoints.atomic`, loads through `restrike.checkpoints.safe_load`.

    A full disk does not end the run at once: the old files stay, nothing is removed, and the next save tries again.
    Remote paths (`s3://…`, by fsspec) are written under a temporary name and then moved.

    Args:
        max_failures: Saves in a row that may fail before the run ends with the error.
        keep_previous: Keep an overwritten file as `<stem>-previous.ckpt`.
    """

    def __init__(self, max_failures: int = 2, keep_previous: bool = True) -> None:
        self.max_failures = max_failures
        self.keep_previous = keep_previous
        self.failures = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file; returns when it is durable, or has failed and may fail.

        Raises:
            OSError: the save failed, and so did `max_failures` before it.
            ValueError: `storage_options`, which this plugin has no use for.
        """
        if storage_options is not None:
            raise ValueError("AtomicCheckpointIO takes no storage_options; configure fsspec instead")
        try:
            _write(checkpoint, path, self.keep_previous)
        except OSError as error:
            self.failures += 1
            if self.failures > self.max_failures:
                raise OSError(error.errno, f"saving {path} failed {self.failures} times in a row: {error}") from error
            rank_zero_warn(
                f"saving {path} failed ({error}); earlier checkpoints are kept, training goes on, "
                f"{self.max_failures - self.failures} more failures in a row are allowed"
            )
        else:
            self.failures = 0

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Check the file, then read plain data and tensors from it, onto the CPU; Lightning moves them.

        Raises:
            CheckpointError: missing, truncated or altered, or it holds other objects.
            ValueError: `weights_only=False` asks to run code from it.
        """
        if weights_only is False:
            raise ValueError("weights_only=False would run code from the checkpoint: leave it out")
        system, name = url_to_fs(str(path))
        if isinstance(system, LocalFileSystem):
            return safe_load(name)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / Path(name).name
            system.get_file(name, str(copy))
            return safe_load(copy)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file and its previous version, unless the save before this has failed."""
        if self.failures:
            rank_zero_warn(f"keeping {path}: the checkpoint that was to replace it could not be saved")
            return
        system, name = url_to_fs(str(path))
        for each in (name, str(atomic.previous_path(name))):
            if system.exists(each):
                system.rm(each, recursive=True)


def _write(checkpoint: dict[str, Any], path: str | Path, keep_previous: bool) -> None:
    system, name = url_to_fs(str(path))
    if isinstance(system, LocalFileSystem):
        atomic.save(checkpoint, name, keep_previous)
        return
    temporary = f"{name}.tmp"
    system.makedirs(name.rpartition("/")[0], exist_ok=True)
    with system.open(temporary, "wb") as stream:
        atomic.write_archive(checkpoint, stream)
    system.mv(temporary, name)
