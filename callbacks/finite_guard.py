"""NaN and infinity never reach the weights, and every rank decides alike without a message.

DDP's all-reduce has already spread one rank's NaN to all of them, so a local look at the gradient norm is a global
decision. It costs one wait for the device per optimiser step.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from restrike.optim import averaged_names, clip_gradients

_KEYS_SHOWN = 8


class NonFiniteGradientError(RuntimeError):
    """Gradients are not finite, and the run may not skip them (any more)."""


class FiniteGuard(Callback):
    """Skips, or stops at, an optimiser step whose gradient norm is not finite.

    A skipped step leaves weights, optimiser state and BatchNorm statistics as if its batches had never come; the
    schedule and `global_step` go on. Under 16-mixed the gradient scaler skips by itself while it looks for its scale,
    and this only counts.

    Args:
        on_nonfinite: "skip" the step, or "stop" the run.
        max_consecutive: Stop after that many skipped steps in a row.
        keep_buffers: Also put BatchNorm statistics back, which the forward pass of a NaN batch poisons. Costs one copy
            of them per step.
    """

    def __init__(
        self, on_nonfinite: Literal["skip", "stop"] = "skip", max_consecutive: int = 10, keep_buffers: bool = True
    ) -> None:
        if on_nonfinite not in ("skip", "stop"):
            raise ValueError(f"expected callbacks.finite_guard.on_nonfinite to be skip or stop, got {on_nonfinite!r}")
        self.on_nonfinite = on_nonfinite
        self.max_consecutive = max_consecutive
        self.keep_buffers = keep_buffers
        self.skipped = 0
        self.consecutive = 0
        self._keys: list[str] = []
        self._batches: list[tuple[list[str], Tensor]] = []  # of this optimiser step: sample keys, loss
        self._buffers: list[Tensor] = []
        self._good: list[Tensor] = []
        self._group_steps: list[Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the first copy of the buffers."""
        if self.keep_buffers:
            names = set(averaged_names(pl_module))
            self._buffers = [b for name, b in pl_module.named_buffers() if name in names]
            self._good = [b.clone() for b in self._buffers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember whose gradients come next."""
        keys = getattr(batch, "keys", None)
        self._keys = keys if isinstance(keys, list) else [f"batch {batch_idx}"]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss, still on its device, for a message that names the batch."""
        self._batches.append((self._keys, loss.detach()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the norm: gradients are unscaled, reduced over ranks, and not yet clipped."""
        norm = clip_gradients(pl_module.parameters())
        batches, self._batches = self._batches, []
        if norm is None or bool(torch.isfinite(norm)):
            self.consecutive = 0
            _copy(self._good, self._buffers)
            return
        self.skipped += 1
        self.consecutive += 1
        message = self._message(trainer, norm, batches)
        optimizer.zero_grad(set_to_none=True)  # every torch and timm optimiser passes over parameters without one
        _copy(self._buffers, self._good)
        if self.on_nonfinite == "stop" or self.consecutive > self.max_consecutive:
            raise NonFiniteGradientError(message)
        rank_zero_warn(f"{message}; skipped")
        # timm's LAMB, among others, counts steps per group, for its bias correction, even where nothing has a gradient.
        self._group_steps = [_clone(group.get("step")) for group in optimizer.param_groups]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take back the step that a skipped group has counted."""
        if self._group_steps is None:
            return
        for group, step in zip(trainer.optimizers[0].param_groups, self._group_steps, strict=True):
            if step is not None:
                group["step"] = step
            else:
                group.pop("step", None)
        self._group_steps = None

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.consecutive = state_dict["skipped"], state_dict["consecutive"]

    def _message(self, trainer: Trainer, norm: Tensor, batches: list[tuple[list[str], Tensor]]) -> str:
        guilty = [keys for keys, loss in batches if not bool(torch.isfinite(loss).all())]
        if guilty:
            shown = [key for keys in guilty for key in keys]
            source = f"the loss of this rank's samples {', '.join(shown[:_KEYS_SHOWN])}"
            source += f" and {len(shown) - _KEYS_SHOWN} more is" if len(shown) > _KEYS_SHOWN else " is"
            source += " not finite"
        else:
            source = "this rank's loss is finite, so it came from the backward pass or from another rank"
        return (
            f"gradient norm is {float(norm)} at step {trainer.global_step} (epoch {trainer.current_epoch}, rank "
            f"{trainer.global_rank}), {self.consecutive} in a row of {self.max_consecutive} allowed: {source}"
        )


def _clone(step: Any) -> Any:
    return step.clone() if isinstance(step, Tensor) else step


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)
