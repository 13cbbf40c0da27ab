"""Models by name. Importing this package registers FasterViT with timm."""

from restrike.models.registry import build, list_models

__all__ = ["build", "list_models"]
