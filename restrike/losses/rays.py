"""DiffusionSfM's training objective (arXiv 2505.05473): squared error of the predicted clean rays."""

from __future__ import annotations

from torch import Tensor

from restrike.geometry import full_precision


@full_precision
def ray_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over *all* elements of (mask · predicted - mask · target)²; masked ones count as zeros.

    Args:
        predicted: [B, V, 8, P, P]; not normalised.
        target: [B, V, 8, P, P].
        mask: [B, V, P, P], 1 (or True) where depth is known.
    """
    return ((predicted - target) * mask[:, :, None].to(target)).square().mean()
