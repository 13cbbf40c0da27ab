"""Factors on learning rates by parameter name, which may change from one stage of a run to the next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from lightning.pytorch import Trainer

Factors = Mapping[str, float | dict[int, float]]


class StagedFactors:
    """Glob over parameter names → factor, or → first epoch or step of a stage → factor from there on (before it: 1).

    Raises:
        ValueError: a factor that is not positive and finite, or a stage before 0.
    """

    def __init__(self, factors: Factors, key: str) -> None:
        self._by_glob: dict[str, dict[int, float]] = {}
        for glob, given in factors.items():
            stages = given if isinstance(given, Mapping) else {0: given}
            by_stage = {0: 1.0, **{int(start): float(factor) for start, factor in sorted(stages.items())}}
            if min(by_stage) < 0 or not all(0 < factor < math.inf for factor in by_stage.values()):
                raise ValueError(
                    f"{key}.{glob}: expected factors above 0 from stages on that begin at 0 or later: {given}"
                )
            self._by_glob[glob] = by_stage

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_glob)

    def at(self, reached: int) -> dict[str, float]:
        """The factor of each glob at an epoch or step."""
        return {
            glob: by_stage[max(start for start in by_stage if start <= reached)]
            for glob, by_stage in self._by_glob.items()
        }


def rescale(trainer: Trainer, ratios: Mapping[str, float]) -> None:
    """Multiply rates, and what schedulers scale, of the groups that `restrike.optim.param_groups` made for each glob.

    Raises:
        ValueError: a scheduler has no `base_lrs` to change (torch's own have).
    """
    by_name = {glob.removeprefix("net.").removesuffix(".*"): ratio for glob, ratio in ratios.items()}
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for optimizer in trainer.optimizers:
        for index, group in enumerate(optimizer.param_groups):
            ratio = by_name.get(str(group.get("name", "")).rpartition("/")[0], 1.0)
            if ratio == 1.0:
                continue
            for name in ("lr", "initial_lr"):
                if name in group:
                    group[name] *= ratio
            for scheduler in schedulers:
                if scheduler.optimizer is not optimizer:  # type: ignore[union-attr]
                    continue
                if not hasattr(scheduler, "base_lrs"):
                    raise ValueError(
                        f"callbacks.staged_freezing.lr_factors: {type(scheduler).__name__} has no base_lrs to change "
                        "from one stage to the next; give one factor for the whole run"
                    )
                scheduler.base_lrs[index] *= ratio
