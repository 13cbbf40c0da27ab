"""EMA of the network's weights, as timm and the FasterViT release keep it, and as a teacher can use it.

Lightning's own `EMAWeightAveraging` is another thing: its first update copies the weights, its copy stays in train
mode, and it swaps weights around validation, so that raw and averaged weights cannot both be evaluated.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from callbacks.protocols import TakesAverage, require
from callbacks.ranks import gather, unflatten_, world
from restrike.optim import WeightAverage


class EMA(Callback):
    """Follows `module.net` and hands it to the module as `averaged`.

    The average moves after every optimiser step, also when a gradient scaler skipped it. It starts from the weights
    that every rank has after DDP's broadcast. The checkpoint keeps it under `callbacks["EMA"]["shadow"]`; validate,
    test and predict restore it from there.

    BatchNorm statistics of the copy differ between ranks, and only rank 0's checkpoint is written: `state_dict`
    gathers them from all ranks, so every rank must take part in saving, as Lightning's own saving does.

    Args:
        decay: Weight of the old average at every update.
    """

    def __init__(self, decay: float = 0.9998) -> None:
        self.decay = decay
        self.average: WeightAverage | None = None
        self._has_history = False  # of a fit, or from a checkpoint
        self._step = 0

    def shadow(self) -> nn.Module:
        """The averaged network: eval mode, no gradients."""
        assert self.average is not None, "setup makes it"
        return self.average.module

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the network; Lightning loads a checkpoint's state after this, and moves to the device later still."""
        require(pl_module, TakesAverage, "ema")
        if self.average is None or pl_module.averaged != self.shadow:
            self.average = WeightAverage(pl_module.net, self.decay)
            self._has_history = False
        pl_module.averaged = self.shadow

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move to the device; a new run starts from the weights that DDP has just broadcast."""
        self._move(pl_module)
        if not self._has_history:
            self.average.restart()
            self._has_history = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the (resumed) run stands."""
        self._step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow tensors that were replaced, if any."""
        self.average.bind(pl_module.net)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update once per optimiser step, not per accumulated batch."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.average.update()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Offer the average to a validation outside of fit."""
        self._offer(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Offer the average to a test."""
        self._offer(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Offer the average to a prediction."""
        self._offer(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The averaged state dict, and every rank's BatchNorm statistics where there are several ranks."""
        if self.average is None:
            return {}
        state: dict[str, Any] = {"shadow": self.average.state_dict()}
        rank_buffers = gather(self.average.buffers())
        if rank_buffers is not None:
            state["rank_buffers"] = rank_buffers
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the average, with this rank's own statistics if the number of ranks is the same."""
        self.average.load_state_dict(state_dict["shadow"])
        self._has_history = True
        rank, size = world()
        rank_buffers: Tensor | None = state_dict.get("rank_buffers")
        if rank_buffers is not None and len(rank_buffers) == size:
            unflatten_(self.average.buffers(), rank_buffers[rank])

    def _move(self, pl_module: LightningModule) -> None:
        self.shadow().to(pl_module.device)
        self.average.bind(pl_module.net)

    def _offer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_history:
            self._move(pl_module)
        else:
            rank_zero_info("EMA: no averaged weights were trained or loaded, so only the raw weights are evaluated")
            pl_module.averaged = None
