"""One LightningModule per kind of training."""

from lightning_modules.base import TrainingModule
from lightning_modules.classification import ClassificationModule
from lightning_modules.multiview_reconstruction import MultiViewReconstructionModule
from lightning_modules.ray_diffusion import RayDiffusionModule
from lightning_modules.recurrent_reconstruction import RecurrentReconstructionModule

__all__ = [
    "ClassificationModule",
    "MultiViewReconstructionModule",
    "RayDiffusionModule",
    "RecurrentReconstructionModule",
    "TrainingModule",
]
