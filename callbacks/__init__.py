"""Callbacks: one behaviour each. They work alone or together, in any order, and keep their state in the checkpoint."""

from callbacks.batch_norm_sync import BatchNormSync
from callbacks.curves import Curves
from callbacks.ema import EMA
from callbacks.finite_guard import FiniteGuard, NonFiniteGradientError
from callbacks.log_predictions import LogPredictions
from callbacks.lr_scaling import LRScaling
from callbacks.mesa import MESA
from callbacks.publish import PublishWeights
from callbacks.report import Report
from callbacks.step_seed import StepSeed
from callbacks.throughput import Throughput
from callbacks.validation_guard import TrainingDivergedError, ValidationGuard
from callbacks.write_predictions import WritePredictions

__all__ = [
    "EMA",
    "MESA",
    "BatchNormSync",
    "Curves",
    "FiniteGuard",
    "LRScaling",
    "LogPredictions",
    "NonFiniteGradientError",
    "PublishWeights",
    "Report",
    "StepSeed",
    "Throughput",
    "TrainingDivergedError",
    "ValidationGuard",
    "WritePredictions",
]
