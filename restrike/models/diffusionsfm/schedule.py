"""The noise schedule of DiffusionSfM (arXiv 2505.05473).

Unusual: beta *falls* from 0.0120 to 0.00085, and √ᾱ is then shifted and stretched so that the last time is pure noise
(arXiv 2305.08891): ᾱ₉₉ = 0 exactly. Only the linear schedule is stretched.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

ScheduleType = Literal["linear", "cosine", "scaled_linear"]
_COSINE_SHIFT = 0.008
_MAX_BETA = 0.999


class NoiseSchedule(nn.Module):
    """betas, alphas and alphas_cumprod (ᾱ), each [max_timesteps] float32; a setting of the model, not learnt.

    Args:
        type: How beta runs.
        max_timesteps: T; times are 0 (almost clean) … T - 1.
        beta_start: Not for "cosine".
        beta_end: Not for "cosine".
        cos_power: Of "cosine" alone.

    Raises:
        ValueError: an unknown type.
    """

    derived_buffers = frozenset({"betas", "alphas", "alphas_cumprod"})
    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor

    def __init__(
        self,
        type: ScheduleType = "linear",
        max_timesteps: int = 100,
        beta_start: float = 0.0120,
        beta_end: float = 0.00085,
        cos_power: float = 2,
    ) -> None:
        super().__init__()
        if type == "linear":
            betas = _zero_terminal(torch.linspace(beta_start, beta_end, max_timesteps))
        elif type == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, max_timesteps) ** 2
        elif type == "cosine":
            betas = _cosine_betas(max_timesteps, cos_power)
        else:
            raise ValueError(f"noise_schedule: expected linear, cosine or scaled_linear, got {type!r}")
        self.register_buffer("betas", betas)
        self.register_buffer("alphas", 1 - betas)
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, dim=0))

    @property
    def max_timesteps(self) -> int:
        return len(self.betas)

    def inference_timesteps(self, num_steps: int) -> list[int]:
        """The times that a sampler of `num_steps` steps visits: (n - 1) k, …, k, 0 with k = ⌊T / n⌋.

        Raises:
            ValueError: not in 1 … T.
        """
        if not 1 <= num_steps <= self.max_timesteps:
            raise ValueError(f"num_steps: expected 1 … {self.max_timesteps} (the schedule's times), got {num_steps}")
        stride = self.max_timesteps // num_steps
        return [k * stride for k in reversed(range(num_steps))]

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ x₀ + √(1 - ᾱ) ε for x₀, ε [B, ...] and times [B]."""
        signal, spread = self._coefficients(timesteps, clean)
        return signal * clean + spread * noise

    def implied_noise(self, noisy: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
        """ε of x_t and a prediction of x₀: (x_t - √ᾱ x₀) / √(1 - ᾱ)."""
        signal, spread = self._coefficients(timesteps, noisy)
        return (noisy - signal * clean) / spread

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod[timesteps].view(-1, *(1,) * (like.ndim - 1))
        return kept.sqrt(), (1 - kept).sqrt()


# Both in float32 and in this order of operations, so that released tables come out bit by bit: ᾱ near 0 is a difference
# of almost equal numbers.


def _zero_terminal(betas: Tensor) -> Tensor:
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    kept = root.square()
    return 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])


def _cosine_betas(steps: int, power: float) -> Tensor:
    """From ᾱ(u) = cos((u + s) / (1 + s) · π/2)^power (arXiv 2102.09672)."""
    u = torch.linspace(0, steps, steps + 1) / steps
    kept = torch.cos((u + _COSINE_SHIFT) / (1 + _COSINE_SHIFT) * math.pi * 0.5) ** power
    kept = kept / kept[0]
    return (1 - kept[1:] / kept[:-1]).clamp(0, _MAX_BETA)
