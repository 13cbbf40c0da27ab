"""LightningDataModules: they tie sources, transforms and loaders to a trainer's ranks, epochs and checkpoints."""

from datamodules.co3d import CO3DDataModule
from datamodules.co3d_orders import CO3DOrdersDataModule
from datamodules.evaluation_views import EvaluationViewsDataModule
from datamodules.image_folder import ImageFolderDataModule
from datamodules.imagenet import ImageNetDataModule
from datamodules.imagenet_variants import ImageNetVariantsDataModule
from datamodules.mixture import MixtureDataModule
from datamodules.photo_folder import PhotoFolderDataModule

__all__ = [
    "CO3DDataModule",
    "CO3DOrdersDataModule",
    "EvaluationViewsDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "ImageNetVariantsDataModule",
    "MixtureDataModule",
    "PhotoFolderDataModule",
]
