"""The DiffusionSfM models under their names."""

from __future__ import annotations

from typing import Any

from torch import nn

from restrike.models.diffusionsfm.model import DiffusionSfM
from restrike.models.layers.variants import create_variant

VARIANTS: dict[str, dict[str, Any]] = {
    "diffusionsfm_sparse": {},
    "diffusionsfm_dense": {"is_dense": True},
}


def create(name: str, **overrides: Any) -> nn.Module:
    """A variant, with constructor arguments of `DiffusionSfM` overridden by keyword.

    Raises:
        ValueError: an argument that `DiffusionSfM` has not.
    """
    return create_variant(DiffusionSfM, name, VARIANTS[name], overrides)
