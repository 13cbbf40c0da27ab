"""Buffers that can be recomputed from a module's settings and parameters.

Released checkpoints carry such tables (4.9 GB of them for FasterViT-4 at 768 pixels), so they must keep their names
and shapes in `state_dict()`, but they need cost neither memory nor time: large ones are expanded views of one
element, loading skips them, and data-parallel training and weight averaging leave them alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Below this size a placeholder is an ordinary tensor, so that tools that write to every buffer in place work too.
_ORDINARY_UP_TO = 1 << 18  # elements, 1 MiB in float32


def placeholder(*shape: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros of that shape; large ones are read-only views with strides 0 over one element."""
    view = torch.zeros((), device=device, dtype=dtype).expand(shape)
    return view if view.numel() > _ORDINARY_UP_TO else view.clone()


class DerivedBuffers(nn.Module):
    """Base of modules all of whose own buffers are derived.

    A subclass lists them in `derived_buffers`, in state-dict order, and says in `_build_derived` what the live module
    holds (placeholders, or values that forward reads) and in `derived_values` what a published file holds.
    """

    derived_buffers: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_follow_parameters)

    @abstractmethod
    def _build_derived(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the live module holds."""

    @abstractmethod
    def derived_values(self) -> dict[str, Tensor]:
        """The true values, computed from the current parameters."""

    def reset_derived(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        device = device if device is not None else torch.get_default_device()
        for name, value in self._build_derived(device, dtype or torch.get_default_dtype()).items():
            self.register_buffer(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DerivedBuffers:
        # Rebuilt, not mapped: `fn` would give a stride-0 view a storage of its full size.
        buffers = self._hide()
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, device=_float(buffers).device, dtype=_float(buffers).dtype))
        self.reset_derived(probe.device, probe.dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Hidden while loading: neither missing, nor unexpected, nor of a wrong shape.
        for name in self.derived_buffers:
            state_dict.pop(prefix + name, None)
        buffers = self._hide()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._buffers.update(buffers)

    def _hide(self) -> dict[str, Tensor]:
        return {name: self._buffers.pop(name) for name in list(self._buffers)}  # type: ignore[misc]


def _float(buffers: dict[str, Tensor]) -> Tensor:
    return next(b for b in buffers.values() if b.is_floating_point())


def _follow_parameters(module: nn.Module, incompatible_keys: Any) -> None:
    """After `load_state_dict(assign=True)` into a model on the meta device."""
    assert isinstance(module, DerivedBuffers)
    parameter, buffer = next(module.parameters()), _float(dict(module.named_buffers(recurse=False)))
    if parameter.device != buffer.device:
        module.reset_derived(parameter.device, parameter.dtype)


def derived_modules(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every submodule that declares derived buffers, with its name."""
    for name, child in module.named_modules():
        if getattr(child, "derived_buffers", None):
            yield name, child


def derived_buffer_names(module: nn.Module) -> list[str]:
    """Full names of all derived buffers under `module`."""
    return [
        f"{name}.{buffer}" if name else buffer
        for name, child in derived_modules(module)
        for buffer in child._buffers
        if buffer in child.derived_buffers
    ]


def exclude_derived_from_ddp(module: nn.Module) -> None:
    """Tell DistributedDataParallel not to broadcast derived buffers; call it on the very module that DDP will wrap."""
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        module, derived_buffer_names(module)
    )
