"""The DiffusionSfM models under their names."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from restrike.models.diffusionsfm.model import DiffusionSfM

VARIANTS: dict[str, dict[str, Any]] = {
    "diffusionsfm_sparse": {},
    "diffusionsfm_dense": {"is_dense": True},
}


def create(name: str, **overrides: Any) -> nn.Module:
    """A variant, with constructor arguments of `DiffusionSfM` overridden by keyword.

    Raises:
        ValueError: an argument that `DiffusionSfM` has not.
    """
    known = inspect.signature(DiffusionSfM).parameters.keys()
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=3)
            raise ValueError(f"{name} has no argument {key!r}; nearest: {', '.join(near or sorted(known))}")
    return DiffusionSfM(**{**VARIANTS[name], **overrides})
