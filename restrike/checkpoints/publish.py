"""A checkpoint in the layout of the FasterViT release, which its code and timm load."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from restrike.checkpoints import atomic
from restrike.models.layers.derived import DerivedBuffers, derived_modules

_VERSION = 2


def save_released(
    path: str | os.PathLike[str],
    net: nn.Module,
    ema: nn.Module | Mapping[str, Tensor] | None = None,
    epoch: int | None = None,
    arch: str | None = None,
    metric: float | None = None,
) -> None:
    """Write `state_dict` and `state_dict_ema`, atomically, tensors on the CPU.

    Derived buffers are written with their true values, so that a strict load elsewhere finds all it expects (4.9 GB
    of them for FasterViT-4 at 768 pixels).

    Args:
        ema: the averaged model, or its state dict.
        metric: of the validation that chose these weights.
    """
    if isinstance(ema, Mapping):
        weights, ema = ema, copy.deepcopy(net)
        ema.load_state_dict(weights)
    content = {
        "epoch": epoch,
        "arch": arch if arch is not None else type(net).__name__,
        "state_dict": _complete(net),
        "state_dict_ema": None if ema is None else _complete(ema),
        "metric": metric,
        "version": _VERSION,
    }
    kept = {key: value for key, value in content.items() if value is not None}
    atomic.save(kept, Path(path), keep_previous=False, with_crc32=True)


def _complete(net: nn.Module) -> dict[str, Tensor]:
    """State dict on the CPU with the true values of derived buffers."""
    state = {name: value.detach().cpu() for name, value in net.state_dict().items()}
    for prefix, module in derived_modules(net):
        if not isinstance(module, DerivedBuffers):  # tables that the live module holds as they are
            continue
        for name, value in module.derived_values().items():
            state[f"{prefix}.{name}"] = value.detach().cpu()
    return state
