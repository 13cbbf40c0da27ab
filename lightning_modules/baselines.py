"""A network of random weights beside the trained one: what a test's numbers are worth."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from lightning_modules.in_parts import TrainsInParts
from lightning_modules.networks import build_network


class ComparesWithUntrained(TrainsInParts):
    """Evaluates such a network too, in a test whose module says `test_untrained`; logs when an evaluation ends."""

    predicts_only: bool = False  # set by a callback that scores what `predict_step` says, in place of these metrics
    _untrained: tuple[nn.Module, ...] = ()  # a tuple, so that it is no submodule

    def competitors(self, stage: str) -> dict[str, nn.Module]:
        """Networks to evaluate, by the suffix of their metrics; see `evaluated`."""
        nets = self.evaluated()
        if stage == "test" and self.hparams.test_untrained:
            if not self._untrained:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)  # the same on all ranks
                    net = build_network(self.hparams.model_name, **(self.hparams.model_args or {}))
                self._untrained = (net.to(self.device).eval(),)
            nets["_untrained"] = self._untrained[0]
        return nets

    @abstractmethod
    def log_metrics(self, stage: str) -> None:
        """Log what an evaluation has gathered."""

    def on_validation_epoch_end(self) -> None:
        """Log what the ranks have summed."""
        self.log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """As after a validation."""
        self.log_metrics("test")

    def on_test_end(self) -> None:
        """Free the untrained network."""
        self._untrained = ()
