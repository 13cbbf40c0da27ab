"""The released VGGT models under their names."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from restrike.models.vggt.model import VGGT

# VGGT-1B and VGGT-1B-Commercial are the same network with other weights. Its fine-tuning build on CO3D has no point
# and track heads.
VARIANTS: dict[str, dict[str, Any]] = {
    "vggt_1b": {},
    "vggt_1b_camera_depth": {"enable_point": False, "enable_track": False},
}


def create(name: str, **overrides: Any) -> nn.Module:
    """A released variant, with constructor arguments of `VGGT` overridden by keyword.

    Raises:
        ValueError: an argument that `VGGT` has not.
    """
    known = inspect.signature(VGGT).parameters.keys()
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=3)
            raise ValueError(f"{name} has no argument {key!r}; nearest: {', '.join(near or sorted(known))}")
    return VGGT(**{**VARIANTS[name], **overrides})
