"""LightningDataModules: they tie sources, transforms and loaders to a trainer's ranks, epochs and checkpoints."""

from datamodules.co3d import CO3DDataModule
from datamodules.image_folder import ImageFolderDataModule
from datamodules.imagenet import ImageNetDataModule

__all__ = ["CO3DDataModule", "ImageFolderDataModule", "ImageNetDataModule"]
