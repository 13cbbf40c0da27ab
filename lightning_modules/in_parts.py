"""One optimiser step from several backward passes over parts of a batch, under any strategy.

All parts but the last have their backward pass within `training_step`: under DDP that is before it expects gradients,
so they stay on this rank, and the last part's all-reduce takes the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_modules.base import TrainingModule

Part = TypeVar("Part")


class TrainsInParts(TrainingModule):
    """Adds `loss_in_parts`; Lightning clears gradients between `training_step` and its own backward pass."""

    _keeps_gradients = False

    def loss_in_parts(
        self, parts: Sequence[Part], shares: Sequence[float], loss_of: Callable[[Part], Tensor], batch_idx: int
    ) -> Tensor:
        """The last part's loss, to be returned by `training_step`; gradients of the others are there by then.

        Args:
            parts: Of the batch.
            shares: Weights of their losses.
            loss_of: Loss of a part, with its graph.
            batch_idx: As `training_step` has it.
        """
        if len(parts) > 1 and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.optimizers(use_pl_optimizer=False).zero_grad()
            self._keeps_gradients = True
        for part, share in zip(parts[:-1], shares[:-1], strict=True):
            loss = share * loss_of(part)
            with torch.autocast(self.device.type, enabled=False):
                self.trainer.strategy.backward(loss / self.trainer.accumulate_grad_batches, None)
        return shares[-1] * loss_of(parts[-1])

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Not where parts of this very step have left their gradients."""
        if self._keeps_gradients:
            self._keeps_gradients = False
            return
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)
