"""Reading back what `python -m cli export --format hub` writes: config.json and model.safetensors in one folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from restrike.checkpoints.load import load_released
from restrike.checkpoints.safe_io import CheckpointError

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def from_pretrained(path: str | os.PathLike[str], **overrides: Any) -> nn.Module:
    """The network of a hub folder, in eval mode, on the CPU.

    Args:
        path: a local folder; nothing is downloaded.
        overrides: constructor arguments in place of the folder's. Where they change the classifier's size, it starts
            anew; any other difference in weights is an error.

    Raises:
        CheckpointError: no such folder, a damaged one, or weights that do not fit.
    """
    folder = Path(path)
    config = _read_config(folder)
    name, arguments = config["architecture"], {**config.get("model_args", {}), **overrides}
    net = build_any(name, **arguments)
    load_released(net, folder / _WEIGHTS, adapt="num_classes" in overrides)
    return net.eval()


def build_any(name: str, **arguments: Any) -> nn.Module:
    """One of Restrike's models or of timm's, with random weights.

    Raises:
        CheckpointError: neither knows the name, or the model refuses an argument.
    """
    import timm

    from restrike import models

    try:
        if name in models.list_models():
            return models.build(name, **arguments)
        if timm.is_model(name.split(".")[0]):
            return timm.create_model(name, pretrained=False, **arguments)
    except TypeError as error:
        raise CheckpointError(f"model {name!r} refused its arguments {sorted(arguments)}: {error}") from error
    raise CheckpointError(f"neither Restrike nor timm has a model {name!r}; does it need a newer version?")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    if not file.is_file():
        why = "has no config.json" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {why}; expected a folder with {_CONFIG} and {_WEIGHTS}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config["architecture"], str) or not isinstance(config.get("model_args", {}), dict):
            raise TypeError("architecture must be a name and model_args a mapping")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is no model description ({error}); expected 'architecture' and 'model_args'"
        ) from error
    return config
