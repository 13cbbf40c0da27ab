"""How the learning rate follows the batch size (Goyal et al., arXiv 1706.02677; Krizhevsky, arXiv 1404.5997), and the
weight decay the length of the run (Loshchilov & Hutter, arXiv 1711.05101)."""

from __future__ import annotations

import math
from typing import Literal, get_args

ScalingRule = Literal["none", "linear", "sqrt"]
SCALING_RULES: tuple[str, ...] = get_args(ScalingRule)
WeightDecayRule = Literal["constant", "normalized"]


def scale_factor(rule: ScalingRule, effective: int, reference: int) -> float:
    """What to multiply a learning rate by that was chosen for `reference` samples per optimiser step.

    Args:
        rule: "none" (1), "linear" (r) or "sqrt" (√r), with r = effective / reference.
        effective: Samples per optimiser step of this run, over all devices and accumulated batches.
        reference: Samples per optimiser step that the learning rate was chosen for.

    Raises:
        ValueError: an unknown rule, or a batch below 1.
    """
    if effective < 1 or reference < 1:
        raise ValueError(f"expected batch sizes of at least 1, got effective {effective}, reference {reference}")
    ratio = effective / reference
    match rule:
        case "none":
            return 1.0
        case "linear":
            return ratio
        case "sqrt":
            return math.sqrt(ratio)
    raise ValueError(f"expected the LR scaling rule to be one of {', '.join(SCALING_RULES)}, got {rule!r}")


def scale_weight_decay(rule: WeightDecayRule, weight_decay: float, steps: int) -> float:
    """The weight decay of a run of so many optimiser steps.

    Args:
        rule: "constant" (as it is), or "normalized": weight_decay · √(1 / steps), so that longer runs and smaller
            batches decay less per step (arXiv 1711.05101, "normalized weight decay"; iFAM's fine-tuning does the same).
        weight_decay: The given one.
        steps: Optimiser steps of the run: steps per epoch × epochs.

    Raises:
        ValueError: an unknown rule, or no steps.
    """
    match rule:
        case "constant":
            return weight_decay
        case "normalized" if steps >= 1:
            return weight_decay * math.sqrt(1 / steps)
        case "normalized":
            raise ValueError(f"expected at least 1 optimiser step, got {steps}")
    raise ValueError(
        f"expected the weight decay rule to be one of {', '.join(get_args(WeightDecayRule))}, got {rule!r}"
    )
