"""BatchNorm statistics averaged over ranks at the end of each epoch, as the FasterViT release does."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.protocols import HasNetwork, require
from callbacks.ranks import average_


def running_statistics(net: nn.Module) -> list[Tensor]:
    """Running means and variances of every normalisation layer that keeps them."""
    return [b for name, b in net.named_buffers() if name.rpartition(".")[2] in ("running_mean", "running_var")]


class BatchNormSync(Callback):
    """Averages the running statistics of the network, and of its EMA, over ranks.

    It acts after the epoch's last step and before the validation that follows, so both see the same network. That is
    `on_validation_start`, which all callbacks reach after the EMA's last update in whatever order they are listed;
    `on_train_epoch_end` serves epochs without a validation.
    """

    def __init__(self) -> None:
        self._synced_epoch = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module without a network."""
        require(pl_module, HasNetwork, "batch_norm_sync")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of a training epoch only: not for a validation in its middle, nor outside of fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_last_batch:
            self._sync(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unless a validation has already done it."""
        self._sync(trainer, pl_module)

    def _sync(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._synced_epoch == trainer.current_epoch:
            return
        self._synced_epoch = trainer.current_epoch
        average_(running_statistics(pl_module.net))
        averaged = getattr(pl_module, "averaged", None)
        if averaged is not None:
            average_(running_statistics(averaged()))
