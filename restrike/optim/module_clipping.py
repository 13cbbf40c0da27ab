"""Gradient clipping by parts of a model, each to a norm of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from restrike.optim.gradients import clip_gradients


def clip_by_module(
    named_parameters: Iterable[tuple[str, nn.Parameter]], max_norms: Mapping[str, float]
) -> dict[str, Tensor]:
    """Clip each part's gradients to its own L2 norm, in place (VGGT's trainer: aggregator, depth, camera, 1.0 each).

    A parameter belongs to the first part whose name begins its own, and is clipped once. (The release matches the name
    anywhere, so that "camera" clips `aggregator.camera_token` a second time when the aggregator is trained.)

    Args:
        named_parameters: As from `model.named_parameters()`.
        max_norms: Part of the model to its limit; "depth" is the part of `depth_head.norm.weight`.

    Returns:
        Part to norm before clipping, scalars; parts without gradients are left out.

    Raises:
        ValueError: a parameter with a gradient belongs to no part.
    """
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in max_norms}
    for name, parameter in named_parameters:
        if parameter.grad is None:
            continue
        part = next((part for part in parts if name.startswith(part)), None)
        if part is None:
            raise ValueError(
                f"parameter {name!r} has a gradient but no limit to clip it to; there are limits for "
                f"{', '.join(parts) or 'nothing'}: add one for {name.split('.')[0]!r}, or freeze it"
            )
        parts[part].append(parameter)
    norms = {part: clip_gradients(parameters, max_norms[part]) for part, parameters in parts.items()}
    return {part: norm for part, norm in norms.items() if norm is not None}


def total_norm(norms: Iterable[Tensor]) -> Tensor:
    """Norm of everything from the norms of its parts, a scalar."""
    return torch.stack(list(norms)).norm()
