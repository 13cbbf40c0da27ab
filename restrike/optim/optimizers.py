"""Optimisers by name, timm's, and the parameter groups that they work on."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers


def create_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    **arguments: Any,
) -> torch.optim.Optimizer:
    """A torch or timm optimiser by timm's name: "adamw", "lamb", "sgd", …

    timm's LAMB clips the global gradient norm to 1 on its own (`max_grad_norm`), after whatever the trainer clipped.

    Args:
        name: One of `timm.optim.list_optimizers()`.
        groups: Parameter groups, as from `param_groups`; a group's `lr_scale` multiplies `lr`.
        lr: Learning rate of groups that set none.
        weight_decay: Weight decay of groups that set none.
        betas: None keeps the optimiser's default.
        eps: None keeps the optimiser's default; FasterViT's LAMB uses 1e-8, not LAMB's own 1e-6.
        arguments: More of the optimiser's arguments, such as momentum, fused or foreach.

    Raises:
        ValueError: an unknown name, or an argument that this optimiser does not take.
    """
    known = list_optimizers()
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        raise ValueError(f"unknown optimizer {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    info = get_optimizer_info(name.lower())
    # timm drops these two without a word where an optimiser has none; a key that nothing reads is an error here.
    for key, value, taken in (("betas", betas, info.has_betas), ("eps", eps, info.has_eps)):
        if value is None:
            continue
        if not taken:
            raise ValueError(f"optimizer {name!r} takes no {key}; leave it out (null)")
        arguments[key] = value
    scaled = [{"lr": lr * group.get("lr_scale", 1.0)} | group for group in groups]
    groups = [{key: value for key, value in group.items() if key != "lr_scale"} for group in scaled]
    try:
        return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, **arguments)
    except TypeError as error:
        raise ValueError(f"optimizer {name!r} refused its arguments {sorted(arguments)}: {error}") from error
