"""Evaluation metrics, as torchmetrics that sum exactly over ranks."""

from restrike.metrics.classification import (
    MeanCrossEntropy,
    TopKAccuracy,
    classification_metrics,
    majority_class_accuracy,
)

__all__ = ["MeanCrossEntropy", "TopKAccuracy", "classification_metrics", "majority_class_accuracy"]
