"""Names of parameters in released checkpoints, where they differ from ours."""

from __future__ import annotations

from collections.abc import Callable

# family -> translation of one of our state-dict names
_MAPS: dict[str, Callable[[str], str]] = {
    "fastervit": lambda name: name,
    "vggt": lambda name: name,
    "diffusionsfm": lambda name: name,
    "cut3r": lambda name: name,
}


def released_name(family: str, our_name: str) -> str:
    """The name under which the family's released checkpoints hold our parameter or buffer `our_name`."""
    if family not in _MAPS:
        raise ValueError(f"unknown family {family!r}; there are: {', '.join(_MAPS)}")
    return _MAPS[family](our_name)
