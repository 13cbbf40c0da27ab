"""LightningDataModules: they tie sources, transforms and loaders to a trainer's ranks, epochs and checkpoints."""

from datamodules.image_folder import ImageFolderDataModule
from datamodules.imagenet import ImageNetDataModule

__all__ = ["ImageFolderDataModule", "ImageNetDataModule"]
