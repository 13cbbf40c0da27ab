"""The released CUT3R models under their names."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from restrike.models.cut3r.model import CUT3R

VARIANTS: dict[str, dict[str, Any]] = {
    "cut3r_224_linear": {"head_type": "linear"},
    "cut3r_512_dpt": {"head_type": "dpt"},
}


def create(name: str, **overrides: Any) -> nn.Module:
    """A released variant, with constructor arguments of `CUT3R` overridden by keyword.

    Raises:
        ValueError: an argument that `CUT3R` has not.
    """
    known = inspect.signature(CUT3R).parameters.keys()
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=3)
            raise ValueError(f"{name} has no argument {key!r}; nearest: {', '.join(near or sorted(known))}")
    return CUT3R(**{**VARIANTS[name], **overrides})
