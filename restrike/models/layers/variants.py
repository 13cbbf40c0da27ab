"""A released model by its name, with constructor arguments overridden: the same for every family."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def create_variant(kind: type[nn.Module], name: str, variant: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """`kind` with a variant's arguments, and `overrides` over them.

    Raises:
        ValueError: an argument that `kind` has not; names the nearest.
    """
    known = inspect.signature(kind).parameters.keys()
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=3)
            raise ValueError(f"{name} has no argument {key!r}; nearest: {', '.join(near or sorted(known))}")
    return kind(**{**variant, **overrides})
