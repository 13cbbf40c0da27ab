"""Weights of a released file, or of one of our own checkpoints, into a model.

What a file may look like: a plain state dict; one under `state_dict` or `model` (release, timm), with EMA weights
under `state_dict_ema`; a Lightning checkpoint of this project (`state_dict` with prefix `net.`, EMA weights in the
EMA callback's state). Derived buffers are dropped, as the model recomputes them; everything else must match.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from restrike.checkpoints.key_maps import released_name
from restrike.checkpoints.safe_io import CheckpointError, safe_load
from restrike.models.layers.derived import derived_buffer_names

_log = logging.getLogger(__name__)
_SHOWN = 5
_RAW_KEYS = ("state_dict", "model")
_EMA_KEYS = ("state_dict_ema", "model_ema")
# Wrappers that put themselves before every name: Lightning's module, data parallelism, torch.compile.
_WRAPPERS = ("net.", "module.", "_orig_mod.")

StateDict = dict[str, Tensor]


class LoadReport(NamedTuple):
    """Names without a partner, derived buffers left out."""

    missing: list[str]  # in the model only
    unexpected: list[str]  # in the file only


def load_released(
    model: nn.Module,
    path: str | os.PathLike[str],
    strict: bool = True,
    use_ema: bool = False,
    *,
    adapt: bool = False,
    sha256: str | None = None,
) -> LoadReport:
    """Load the weights of a released file or an own checkpoint into `model`, in place.

    A model may list regular expressions in `optional_keys`: names that matter at some image sizes only (FasterViT's
    carrier tokens). Differences in those are warned of, not refused.

    Args:
        strict: names must match otherwise; if not, differences are warned of.
        use_ema: take the averaged weights.
        adapt: leave out a classifier of another size (or one that the file lacks), convert the first convolution to
            other input channels, and let timm's models resample position tables for another resolution.
        sha256: see `safe_load`.

    Raises:
        CheckpointError: unreadable, no weights in it, no EMA weights, wrong shapes, or (strict) other names.
    """
    state = _our_names(model, select_state_dict(safe_load(path, sha256), str(path), use_ema))
    own = model.state_dict(keep_vars=True)
    derived = set(derived_buffer_names(model))
    state = {name: value for name, value in state.items() if name not in derived}
    if adapt:
        state = _converted_by_timm(model, state)
    left_out = _adapt(state, own, getattr(model, "pretrained_cfg", {})) if adapt else []
    _check_shapes(state, own, str(path))
    missing = [name for name in _missing(state, own) if name not in derived and name not in left_out]
    report = LoadReport(missing, [name for name in state if name not in own])
    _judge(report, getattr(model, "optional_keys", ()), str(path), strict)  # before the first weight is touched
    model.load_state_dict(state, strict=False)
    return report


def select_state_dict(content: Any, source: str, use_ema: bool = False) -> StateDict:
    """The raw or averaged state dict in a checkpoint's content, without the prefixes of wrappers."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds a {type(content).__name__}, expected a state dict or a checkpoint")
    found: Any
    if use_ema:
        found = _averaged(content)
        if found is None:
            keys = ", ".join(map(str, list(content)[:_SHOWN]))
            raise CheckpointError(f"{source} has no EMA weights (its keys: {keys} …); load it with use_ema=False")
    else:
        found = next((content[key] for key in _RAW_KEYS if isinstance(content.get(key), Mapping)), content)
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(found):
        wrong = next((str(name) for name in found if str(name) not in tensors), "nothing")
        raise CheckpointError(f"{source} has no state dict: expected tensors by name, found {wrong!r}")
    if "pytorch-lightning_version" in content and any(name.startswith("net.") for name in tensors):
        tensors = {name: value for name, value in tensors.items() if name.startswith("net.")}
    return _without_prefixes(tensors)


def _averaged(content: Mapping[str, Any]) -> Any:
    for key in _EMA_KEYS:
        if isinstance(content.get(key), Mapping):
            return content[key]
    callbacks = content.get("callbacks")
    for key, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        if str(key).startswith("EMA") and isinstance(state, Mapping) and isinstance(state.get("shadow"), Mapping):
            return state["shadow"]
    return None


def _without_prefixes(state: StateDict) -> StateDict:
    while prefix := next((p for p in _WRAPPERS if next(iter(state)).startswith(p)), None):
        state = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    if min(state).startswith("encoder."):  # a backbone in a self-supervised checkpoint
        state = {name.removeprefix("encoder."): v for name, v in state.items() if name.startswith("encoder.")}
    return state


def _our_names(model: nn.Module, state: StateDict) -> StateDict:
    family = getattr(model, "family", None)
    if family is None:
        return state
    ours = {released_name(family, name): name for name in model.state_dict()}
    return {ours.get(name, name): value for name, value in state.items()}


def _converted_by_timm(model: nn.Module, state: StateDict) -> StateDict:
    """What timm itself does to weights of this architecture: older names, position tables of another resolution."""
    home = type(model).__module__
    convert = getattr(sys.modules.get(home), "checkpoint_filter_fn", None) if home.startswith("timm.models.") else None
    return dict(convert(state, model)) if convert else state


def _adapt(state: StateDict, own: StateDict, cfg: Mapping[str, Any]) -> list[str]:
    """Change `state` to fit; returns the names that were left out."""
    from timm.models import adapt_input_conv

    first, classifier = f"{cfg.get('first_conv')}.weight", cfg.get("classifier")
    if first in state and first in own and state[first].shape != own[first].shape:
        state[first] = adapt_input_conv(own[first].shape[1], state[first])
    head = [name for name in (f"{classifier}.weight", f"{classifier}.bias") if name in own or name in state]
    if head and not any(name in state for name in head):
        _log.warning("the file has no classifier: it starts anew")
        return head
    if any(name in state and (name not in own or state[name].shape != own[name].shape) for name in head):
        for name in head:
            state.pop(name, None)
        _log.warning("the file's classifier has another size and was left out")
        return head
    return []


def _missing(state: StateDict, own: StateDict) -> list[str]:
    """Names of ours that the file does not have, under this or another name of the same tensor."""
    found = {id(own[name]) for name in state if name in own}
    # BatchNorm's counter is absent from old files, and nothing depends on it.
    return [name for name, tensor in own.items() if id(tensor) not in found and "num_batches_tracked" not in name]


def _check_shapes(state: StateDict, own: StateDict, source: str) -> None:
    wrong = [
        f"{name} is {list(value.shape)}, here {list(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{source} is of a model of another shape: {_first(wrong)}; build the model with the file's sizes"
        )


def _judge(report: LoadReport, optional: Iterable[str], source: str, strict: bool) -> None:
    def required(names: list[str]) -> list[str]:
        return [name for name in names if not any(re.search(pattern, name) for pattern in optional)]

    parts = [
        f"{what}: {_first(names)}"
        for what, names in (("only in the model", report.missing), ("only in the file", report.unexpected))
        if names
    ]
    if strict and (required(report.missing) or required(report.unexpected)):
        raise CheckpointError(f"{source} does not fit the model; {'; '.join(parts)}. Is it another variant?")
    if parts:
        _log.warning("%s: some weights were not loaded; %s", source, "; ".join(parts))


def _first(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
