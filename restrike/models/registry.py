"""Every model under its released name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from restrike.models.cut3r import variants as cut3r
from restrike.models.diffusionsfm import variants as diffusionsfm
from restrike.models.fastervit import variants as fastervit
from restrike.models.vggt import variants as vggt

# family -> (names, builder(name, **overrides))
_FAMILIES: dict[str, tuple[Iterable[str], Callable[..., nn.Module]]] = {
    "fastervit": (fastervit.VARIANTS, fastervit.create),
    "vggt": (vggt.VARIANTS, vggt.create),
    "diffusionsfm": (diffusionsfm.VARIANTS, diffusionsfm.create),
    "cut3r": (cut3r.VARIANTS, cut3r.create),
}


def list_models(family: str | None = None) -> list[str]:
    """Names of all models, or of one family's."""
    if family is not None and family not in _FAMILIES:
        raise ValueError(f"unknown family {family!r}; there are: {', '.join(_FAMILIES)}")
    return [name for key, (names, _) in _FAMILIES.items() if family in (None, key) for name in names]


def build(name: str, **overrides: Any) -> nn.Module:
    """A model by its released name, with constructor arguments overridden by keyword."""
    for names, builder in _FAMILIES.values():
        if name in names:
            return builder(name, **overrides)
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
    raise ValueError(
        f"unknown model {name!r}; nearest: {', '.join(near) or 'none'}; restrike.models.list_models() has all names"
    )
