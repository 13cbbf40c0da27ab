"""What callbacks ask of a module or a datamodule: a few attributes, never its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class HasNetwork(Protocol):
    """A module whose `net` is what is trained and published."""

    net: nn.Module


class TakesAverage(HasNetwork, Protocol):
    """A module that evaluates averaged weights where `averaged` is not None; it returns a network in eval mode."""

    averaged: Callable[[], nn.Module] | None


class TakesLossTerms(TakesAverage, Protocol):
    """A module that adds `term(module, batch, logits)` of each term to its loss; a term is already weighted."""

    loss_terms: dict[str, Callable[[Any, Any, Tensor], Tensor]]


class ScalesLearningRate(Protocol):
    """A module that multiplies every group's learning rate by `lr_factor` in `configure_optimizers`."""

    lr_factor: float


class TakesRateFactors(Protocol):
    """A module whose `configure_optimizers` reads, by glob over parameter names, factors on the learning rate."""

    lr_factor_globs: dict[str, float]


class HasBatchSize(Protocol):
    """A datamodule with a batch size of its own."""

    batch_size_per_device: int


class ShowsImages(Protocol):
    """A datamodule that can say what its normalised images and its class indices mean."""

    class_names: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class HasEvaluationSet(Protocol):
    """A datamodule of one test set: `classes`, `label_sets`, `paths`, `sha256`, `description`; see `EvaluationSet`."""

    evaluation_set: Any
    protocol: str


class HasViewSet(Protocol):
    """A datamodule of sequences of views: `view_set` (a `ViewSet` below `root`) by `protocol`; `own_sequences` are this
    rank's, in the order of its batches, each of which begins one where its first `frame_numbers` is 0."""

    view_set: Any
    protocol: str
    root: Any
    own_sequences: Any


class PredictsViews(Protocol):
    """A module whose evaluation steps return what `predict_step` says where this is set: a dict with "world_to_camera"
    [B, V, 3, 4], perhaps "views" (`PredictedViews`), perhaps "points_world" [B, V, P, Q, 3] in the first camera. For
    one that streams, `on_predict_start` begins another scene."""

    predicts_only: bool


class CountsAccuracy(Protocol):
    """A module whose evaluation updates `metrics["test"]` (and val, each with _ema) with logits, targets, valid."""

    metrics: Any


def require(owner: Any, protocol: type, callback: str) -> None:
    """Check that `owner` has what a callback needs.

    Raises:
        ValueError: names the callback, the class and the attributes that it lacks.
    """
    needed = {name for base in protocol.__mro__ for name in getattr(base, "__annotations__", {})}
    missing = sorted(name for name in needed if not hasattr(owner, name))
    if missing:
        raise ValueError(
            f"callbacks.{callback} needs {', '.join(missing)} of {type(owner).__name__}, which has no such"
        )
