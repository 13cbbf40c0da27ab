"""Callbacks: one behaviour each. They work alone or together, in any order, and keep their state in the checkpoint."""

from callbacks.batch_norm_sync import BatchNormSync
from callbacks.benchmark import Benchmark
from callbacks.checkpoint import Checkpoint
from callbacks.checkpoint_io import AtomicCheckpointIO
from callbacks.curves import Curves
from callbacks.ema import EMA
from callbacks.finite_guard import FiniteGuard, NonFiniteGradientError
from callbacks.log_predictions import LogPredictions
from callbacks.log_rays import LogRays
from callbacks.log_views import LogViews
from callbacks.lr_scaling import LRScaling
from callbacks.mesa import MESA
from callbacks.preemption import EXIT_PREEMPTED, PreemptedError, Preemption
from callbacks.publish import PublishWeights
from callbacks.rank_watch import RankWatch
from callbacks.report import Report
from callbacks.rng_state import RngState
from callbacks.staged_freezing import StagedFreezing
from callbacks.step_seed import StepSeed
from callbacks.throughput import Throughput
from callbacks.validation_guard import TrainingDivergedError, ValidationGuard
from callbacks.view_benchmark import ViewBenchmark
from callbacks.write_predictions import WritePredictions
from callbacks.write_scene import WriteScene

__all__ = [
    "EMA",
    "EXIT_PREEMPTED",
    "MESA",
    "AtomicCheckpointIO",
    "BatchNormSync",
    "Benchmark",
    "Checkpoint",
    "Curves",
    "FiniteGuard",
    "LRScaling",
    "LogPredictions",
    "LogRays",
    "LogViews",
    "NonFiniteGradientError",
    "PreemptedError",
    "Preemption",
    "PublishWeights",
    "RankWatch",
    "Report",
    "RngState",
    "StagedFreezing",
    "StepSeed",
    "Throughput",
    "TrainingDivergedError",
    "ValidationGuard",
    "ViewBenchmark",
    "WritePredictions",
    "WriteScene",
]
