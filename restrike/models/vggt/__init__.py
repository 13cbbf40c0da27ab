"""VGGT: cameras, depth, points and tracks from any number of views (arXiv 2503.11651)."""

from restrike.models.vggt.model import VGGT

__all__ = ["VGGT"]
