"""Restrike: published vision models, trained again exactly as published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from torch import nn

__version__ = "0.1.0"


def from_pretrained(path: str | os.PathLike[str], **overrides: Any) -> nn.Module:
    """The network of a folder that `python -m cli export --format hub` wrote; see `restrike.checkpoints.hub`."""
    from restrike.checkpoints.hub import from_pretrained as load  # not above: `import restrike` imports nothing heavy

    return load(path, **overrides)
