"""One LightningModule per kind of training."""

from lightning_modules.classification import ClassificationModule

__all__ = ["ClassificationModule"]
