"""Training objectives: pure functions of predictions and targets, always computed in float32."""

from restrike.losses.camera import CameraLoss, camera_loss
from restrike.losses.classification import binary_cross_entropy, cross_entropy
from restrike.losses.dense import DenseLoss, dense_loss
from restrike.losses.distillation import mesa_loss
from restrike.losses.multiview import LossWeights, MultiViewTargets, multiview_loss
from restrike.losses.rays import ray_loss
from restrike.losses.robust import finite_clamp, masked_mean, nearest_rank_quantile, quantile_filter
from restrike.losses.surface import gradient_loss, normal_loss, surface_normals
from restrike.losses.track import TrackLoss, track_loss

__all__ = [
    "CameraLoss",
    "DenseLoss",
    "LossWeights",
    "MultiViewTargets",
    "TrackLoss",
    "binary_cross_entropy",
    "camera_loss",
    "cross_entropy",
    "dense_loss",
    "finite_clamp",
    "gradient_loss",
    "masked_mean",
    "mesa_loss",
    "multiview_loss",
    "nearest_rank_quantile",
    "normal_loss",
    "quantile_filter",
    "ray_loss",
    "surface_normals",
    "track_loss",
]
