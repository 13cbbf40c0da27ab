"""Reading a checkpoint without running code from it."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from restrike.checkpoints.manifest import DamagedCheckpointError, read_manifest, verify


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and what to do."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no such file."""


class ReleasedArguments:
    """What a released file's `argparse.Namespace` or OmegaConf object becomes: its attributes, and no behaviour."""


# The only classes that a checkpoint may name beside torch's tensors and plain containers. CUT3R's files hold their
# settings as OmegaConf objects, which in turn name the plain types below.
_OMEGACONF = (
    "base.ContainerMetadata", "base.Metadata", "dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode",
    "nodes.BooleanNode", "nodes.FloatNode", "nodes.IntegerNode", "nodes.StringNode",
)  # fmt: skip
_STAND_INS = [
    (ReleasedArguments, "argparse.Namespace"),
    *((ReleasedArguments, f"omegaconf.{name}") for name in _OMEGACONF),
    (ReleasedArguments, "typing.Any"),
    *((kind, f"builtins.{kind.__name__}") for kind in (bool, dict, float, int, list, str)),
    (int, "builtins.long"),
    (defaultdict, "collections.defaultdict"),
]


def safe_load(path: str | os.PathLike[str], sha256: str | None = None) -> Any:
    """Content of a `.pth`, `.pth.tar`, `.pt`, `.ckpt` or `.safetensors` file, tensors on the CPU.

    Args:
        sha256: expected hash of the file, or its first characters.

    Raises:
        CheckpointError: the file is missing, empty, damaged, no checkpoint, has another hash, or holds objects whose
            loading could run code.
    """
    path = Path(path)
    _check_file(path, sha256)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_manifest(path)
        with torch.serialization.safe_globals(list(_STAND_INS)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except DamagedCheckpointError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # damage surfaces as almost anything
        raise CheckpointError(_explain(path, error)) from error


def _check_file(path: Path, sha256: str | None) -> None:
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*") if p.is_file())[:5] if path.parent.is_dir() else []
        raise MissingCheckpointError(f"no checkpoint {path}; its folder has: {', '.join(beside) or 'no files'}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give a checkpoint file in it")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; fetch or write it again")
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if len(sha256) < 8 or not found.startswith(sha256.lower()):
            raise CheckpointError(f"{path} has SHA-256 {found}, expected {sha256!r}; it is another file, or damaged")


def _check_manifest(path: Path) -> None:
    """A file of ours carries its own hash; others are not read twice."""
    if zipfile.is_zipfile(path):
        with path.open("rb") as file:
            has_manifest = read_manifest(file) is not None
        if has_manifest:
            verify(path)


def _explain(path: Path, error: Exception) -> str:
    # torch's refusal is a page that advises to switch the protection off.
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"{path} holds {refused.group(1)}, which is neither a tensor nor a plain value. It was not loaded, because "
            "that could run code; where you trust the file, save its state dict alone"
        )
    kind = "damaged" if path.suffix == ".safetensors" or zipfile.is_zipfile(path) else "truncated or no checkpoint"
    reason = str(error).partition("\n")[0]
    reason = f" ({reason[:200]})" if len(reason) > 3 and "weights_only" not in reason else ""
    return f"{path} ({path.stat().st_size:,} bytes) is {kind}{reason}; fetch or write it again"
