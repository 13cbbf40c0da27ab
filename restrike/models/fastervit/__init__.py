"""FasterViT (arXiv 2306.06189)."""

from restrike.models.fastervit.model import FasterViT

__all__ = ["FasterViT"]
