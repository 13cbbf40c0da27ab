"""Evaluation metrics, as torchmetrics that sum exactly over ranks."""

from restrike.metrics.camera_pose import CameraCenterAccuracy, PoseAccuracy, TrajectoryError
from restrike.metrics.classification import (
    MeanCrossEntropy,
    TopKAccuracy,
    classification_metrics,
    majority_class_accuracy,
)
from restrike.metrics.depth import DepthErrors
from restrike.metrics.multiview import MultiViewMetrics, PointErrors
from restrike.metrics.reconstruction import Chamfer, ReconstructionErrors

__all__ = [
    "CameraCenterAccuracy",
    "Chamfer",
    "DepthErrors",
    "MeanCrossEntropy",
    "MultiViewMetrics",
    "PointErrors",
    "PoseAccuracy",
    "ReconstructionErrors",
    "TopKAccuracy",
    "TrajectoryError",
    "classification_metrics",
    "majority_class_accuracy",
]
