"""The released VGGT models under their names."""

from __future__ import annotations

from typing import Any

from torch import nn

from restrike.models.layers.variants import create_variant
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
    return create_variant(VGGT, name, VARIANTS[name], overrides)
