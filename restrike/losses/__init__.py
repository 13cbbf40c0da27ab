"""Training objectives: pure functions of logits and targets, always computed in float32."""

from restrike.losses.classification import binary_cross_entropy, cross_entropy
from restrike.losses.distillation import mesa_loss

__all__ = ["binary_cross_entropy", "cross_entropy", "mesa_loss"]
