"""Clipping to a norm that a gradient scaler divides, as DiffusionSfM's release does it by an oversight.

Its dense stage scales the loss by S, clips the *scaled* gradients to norm 1 and then divides by S: the optimiser sees
norm 1/S (1.5e-5 at S = 65536), which halves whenever S doubles. Over 4e8 weights that is below Adam's eps, so it acts
as a hidden schedule of the learning rate, and the released weights were made with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_CLIP_EPS = 1e-6  # of torch's clipping, which the release applies to gradients S times as large


class LossScale:
    """Follows the scale of `torch.amp.GradScaler` over a run, without scaling anything.

    Args:
        init_scale: S at the start.
        growth_interval: S doubles after so many good steps in a row; it halves at a step without finite gradients.
    """

    def __init__(self, init_scale: float = 65536.0, growth_interval: int = 100_000) -> None:
        self.init_scale, self.growth_interval = init_scale, growth_interval
        self.restart()

    def restart(self) -> None:
        """As a new scaler."""
        self.scale, self.good_steps = self.init_scale, 0

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor | None:
        """Clip true gradients in place as clipping S times as large ones to `max_norm` would; then count the step.

        Returns:
            The true norm before clipping; None, and a smaller S, where nothing has a gradient: a guard took it away.
        """
        with_gradient = [p for p in parameters if p.grad is not None]
        if not with_gradient:
            self.scale, self.good_steps = self.scale / 2, 0
            return None
        norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
        shifted = norm - _CLIP_EPS * (1 - 1 / self.scale)  # torch adds its eps to a norm that is S times too small
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm / self.scale, shifted)
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def state_dict(self) -> dict[str, Any]:
        """S and the good steps since it changed."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.scale, self.good_steps = state["scale"], state["good_steps"]
