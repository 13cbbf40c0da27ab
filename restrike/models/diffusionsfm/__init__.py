"""DiffusionSfM: cameras and geometry of 2 to 8 views, or more, as a diffusion of rays (arXiv 2505.05473)."""

from restrike.models.diffusionsfm.cameras import cameras_from_ray_map
from restrike.models.diffusionsfm.initialize import dense_from_sparse
from restrike.models.diffusionsfm.model import DiffusionSfM, ImageFeatures
from restrike.models.diffusionsfm.preprocess import load_images
from restrike.models.diffusionsfm.sampler import RaySamples, sample_rays
from restrike.models.diffusionsfm.schedule import NoiseSchedule
from restrike.models.diffusionsfm.targets import RayTargets, ndc_coordinates, ray_targets

__all__ = [
    "DiffusionSfM",
    "ImageFeatures",
    "NoiseSchedule",
    "RaySamples",
    "RayTargets",
    "cameras_from_ray_map",
    "dense_from_sparse",
    "load_images",
    "ndc_coordinates",
    "ray_targets",
    "sample_rays",
]
