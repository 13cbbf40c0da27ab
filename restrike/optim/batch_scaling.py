"""How the learning rate follows the batch size (Goyal et al., arXiv 1706.02677; Krizhevsky, arXiv 1404.5997)."""

from __future__ import annotations

import math
from typing import Literal, get_args

ScalingRule = Literal["none", "linear", "sqrt"]
SCALING_RULES: tuple[str, ...] = get_args(ScalingRule)


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
