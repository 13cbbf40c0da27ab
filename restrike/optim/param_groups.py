"""Parameter groups: which parameters decay, and which learn at another rate than the rest."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

Group = dict[str, Any]
_NAMES_SHOWN = 5


def param_groups(
    model: nn.Module,
    weight_decay: float,
    lr_factors: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    decay_all: bool = False,
) -> list[Group]:
    """Groups for an optimiser: each has `params`, `weight_decay`, a unique `name`, and `lr_scale` where it is not 1.

    Tensors of at most one dimension do not decay, nor do names in the model's own `no_weight_decay()` (position
    embeddings of timm's ViTs, for instance). Frozen parameters are left out.

    The order matters when optimiser state is loaded: "no_decay", then "decay". With `layer_decay` there is such a pair
    ("layer_00_no_decay", …) per layer from the input to the head. With `lr_factors` what no glob matches comes first,
    then the parameters of each glob in the order of the mapping, "GLOB/no_decay" and "GLOB/decay".

    Args:
        model: Its parameters' names are what globs match.
        weight_decay: Of the groups that decay.
        lr_factors: Glob over parameter names → factor on the learning rate; the first glob that matches counts.
        layer_decay: Factor on the learning rate per layer below the head, in (0, 1] (arXiv 2106.08254, BEiT); layers
            are those that the model's `group_matcher` knows, else one per parameter-holding module.
        decay_all: Every parameter decays (VGGT's trainer); the pairs stay two groups.

    Raises:
        ValueError: a glob matches no parameter (names near ones), or `layer_decay` is out of range.
    """
    groups = _by_layer(model, weight_decay, layer_decay) if layer_decay is not None else _by_decay(model, weight_decay)
    if decay_all:
        groups = [group | {"weight_decay": weight_decay} for group in groups]
    if not lr_factors:
        return groups
    chosen = _first_matches(model, lr_factors)
    split = []
    for glob, factor in {"": 1.0, **lr_factors}.items():
        for group in groups:
            params = [p for p in group["params"] if chosen.get(id(p), "") == glob]
            if not params:
                continue
            name = f"{glob.removesuffix('.*')}/{group['name']}" if glob else group["name"]
            split.append(group | {"params": params, "name": name, "lr_scale": factor * group.get("lr_scale", 1.0)})
    return split


def _exempt(model: nn.Module) -> Collection[str]:
    return getattr(model, "no_weight_decay", set)()


def _by_decay(model: nn.Module, weight_decay: float) -> list[Group]:
    # timm makes one group where nothing decays; a decay of 1 tells the two kinds apart also where the real one is 0.
    marked = param_groups_weight_decay(model, 1.0, no_weight_decay_list=_exempt(model))
    return [
        group
        | {
            "weight_decay": weight_decay * group["weight_decay"],
            "name": "decay" if group["weight_decay"] else "no_decay",
        }
        for group in marked
    ]


def _by_layer(model: nn.Module, weight_decay: float, layer_decay: float) -> list[Group]:
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"expected layer_decay in (0, 1], got {layer_decay}")
    # A decay of 1 tells both kinds of group apart also where the real one is 0; a rate per layer does the same there.
    marked = param_groups_layer_decay(model, 1.0, _exempt(model), layer_decay=min(layer_decay, 1 - 1e-9))
    marked.sort(key=lambda group: (group["lr_scale"], group["weight_decay"]))
    scales = sorted({group["lr_scale"] for group in marked})
    groups = []
    for group in marked:
        layer, decays = scales.index(group["lr_scale"]), group["weight_decay"] > 0
        groups.append({
            "params": group["params"],
            "weight_decay": weight_decay if decays else 0.0,
            "name": f"layer_{layer:02d}_{'decay' if decays else 'no_decay'}",
            "lr_scale": group["lr_scale"] if layer_decay < 1.0 else 1.0,
        })  # fmt: skip
    return groups


def _first_matches(model: nn.Module, globs: Mapping[str, float]) -> dict[int, str]:
    """Identity of each parameter that some glob matches → the first such glob."""
    names = [name for name, _ in model.named_parameters()]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            near = difflib.get_close_matches(glob, names, n=_NAMES_SHOWN, cutoff=0.4) or names[-_NAMES_SHOWN:]
            raise ValueError(f"lr_factors: no parameter matches '{glob}'. Near: {', '.join(near)}")
    matches = {}
    for name, parameter in model.named_parameters():
        if found := next((glob for glob in globs if fnmatchcase(name, glob)), None):
            matches[id(parameter)] = found
    return matches
