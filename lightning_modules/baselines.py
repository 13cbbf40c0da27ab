"""Networks beside the trained one that show what a test's numbers are worth: of random weights, or misled."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.in_parts import TrainsInParts
from lightning_modules.networks import build_network


class OnOtherImages(nn.Module):
    """A network that is shown the next scene's images [B, V, 3, H, W] in place of each scene's own: whatever it still
    gets right, it has not read from images. A batch of one scene stays as it is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Any:
        """What `net` says of them."""
        return self.net(images.roll(1, dims=0))


class ComparesWithBaselines(TrainsInParts):
    """Evaluates such networks too, in a test whose module says `test_untrained` or `test_other_images`; logs when an
    evaluation ends."""

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
        if stage == "test" and self.hparams.test_other_images:
            nets["_other_images"] = OnOtherImages(next(iter(nets.values())))
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
