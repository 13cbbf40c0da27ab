"""The released CUT3R models under their names."""

from __future__ import annotations

from typing import Any

from torch import nn

from restrike.models.cut3r.model import CUT3R
from restrike.models.layers.variants import create_variant

VARIANTS: dict[str, dict[str, Any]] = {
    "cut3r_224_linear": {"head_type": "linear"},
    "cut3r_512_dpt": {"head_type": "dpt"},
}


def create(name: str, **overrides: Any) -> nn.Module:
    """A released variant, with constructor arguments of `CUT3R` overridden by keyword.

    Raises:
        ValueError: an argument that `CUT3R` has not.
    """
    return create_variant(CUT3R, name, VARIANTS[name], overrides)
