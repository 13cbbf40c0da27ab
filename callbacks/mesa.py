"""MESA (arXiv 2205.14083): the network learns from its own weight average, from a quarter of the run on."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.protocols import TakesLossTerms, require
from restrike.losses import mesa_loss

_TERM = "mesa"


class MESA(Callback):
    """Adds ratio · mesa_loss(student, EMA) to the loss while epoch / schedule_epochs > start_ratio.

    The teacher is the EMA callback's network: eval mode, no gradient, the same mixed and erased images, the autocast of
    the step. Before the start it is not run at all. The module logs the term as `train/loss_mesa`.

    Args:
        ratio: Weight of the term.
        start_ratio: Share of the schedule without it. FasterViT: 0.25, first epoch 78; variant 3: 0.3, epoch 94.
        schedule_epochs: Length of the cosine, which is the divisor: 310, and not the 320 epochs that really run.
        temperature: Of both distributions.
        weight: Constant factor of the release.
    """

    def __init__(
        self,
        ratio: float,
        start_ratio: float = 0.25,
        schedule_epochs: int = 310,
        temperature: float = 3.0,
        weight: float = 50.0,
    ) -> None:
        self.ratio = ratio
        self.start_ratio = start_ratio
        self.schedule_epochs = schedule_epochs
        self.temperature = temperature
        self.weight = weight

    def is_active(self, epoch: int) -> bool:
        """Whether the term counts in this epoch, from 0."""
        return epoch / self.schedule_epochs > self.start_ratio

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module without loss terms."""
        require(pl_module, TakesLossTerms, "mesa")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to train without a teacher; every callback's setup has run by now."""
        if pl_module.averaged is None:
            raise ValueError("callbacks.mesa learns from averaged weights: add callbacks.ema")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch here: `on_train_epoch_start` is not called for the epoch in whose middle a run resumes."""
        if self.is_active(trainer.current_epoch):
            pl_module.loss_terms[_TERM] = self.term
        else:
            pl_module.loss_terms.pop(_TERM, None)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was."""
        pl_module.loss_terms.pop(_TERM, None)

    def term(self, pl_module: LightningModule, batch: Any, logits: Tensor) -> Tensor:
        """ratio · mesa_loss for one batch."""
        with torch.no_grad():  # not inference_mode, whose tensors autograd cannot keep for the backward pass
            teacher = pl_module.averaged()(batch.images)
        return self.ratio * mesa_loss(logits, teacher, self.temperature, self.weight)
