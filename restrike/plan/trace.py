"""What a computation allocates, multiplies and moves, seen operator by operator; nothing is computed on meta."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Kind = Literal["weights", "gradients", "optimizer", "average", "batch", "activations"]


class Operation(NamedTuple):
    """Operators that take the same time: floating-point operations (a multiply-add is two), bytes read and written,
    and whether its operands are 16 bits wide."""

    flops: int
    bytes: int
    is_half: bool


class Trace(TorchDispatchMode):
    """Follows every storage that is allocated inside, until it is freed.

    Storages are activations until `name` says what else they are. Temporary memory inside a kernel is not seen.

    Args:
        block: bytes that the allocator rounds up to (512 on CUDA).

    Attributes:
        live: bytes by kind, now.
        peak: bytes by kind at the moment when they were the most together.
        peak_without_gradients: the same where gradients are kept elsewhere, as in the buckets of DDP.
        operations: how many operators of each cost.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self._block = block
        self._storages: dict[int, tuple[Any, Kind, int]] = {}
        self.live: Counter[Kind] = Counter()
        self.operations: Counter[Operation] = Counter()
        self._known: dict[Any, _Known] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the peaks and operations so far, keep what is alive."""
        self.operations.clear()
        self.peak, self.peak_without_gradients = Counter(self.live), Counter(self.live)
        self._most, self._most_without = self._totals()

    @property
    def flops(self) -> int:
        return sum(operation.flops * count for operation, count in self.operations.items())

    def name(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Say what these tensors are."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._allocate(storage)
            reference, before, size = self._storages[storage._cdata]
            self._storages[storage._cdata] = reference, kind, size
            self.live[before] -= size
            self.live[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _RETURNS:
            _RETURNS[func] = _what_returns(func)
        if _RETURNS[func] == "views":
            out = func(*args, **kwargs)
            if type(out) is Tensor and out.untyped_storage()._cdata in self._storages:
                return out
            return self._follow(func, args, kwargs, out)
        key = _signature(func, args, kwargs) if _RETURNS[func] == "new" else None
        if key is None:
            return self._follow(func, args, kwargs, func(*args, **kwargs))
        known = self._known.get(key)
        if known is None:
            out = func(*args, **kwargs)
            outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            if _is_alike(out):
                operation = _cost(func, args, kwargs, out, outputs)
                self._known[key] = _Known(operation, tuple(_Made.of(tensor) for tensor in outputs), type(out))
            return self._follow(func, args, kwargs, out)
        made = [output.again() for output in known.outputs]
        self._account(made, known.operation)
        return made[0] if known.kind is Tensor else known.kind(made)

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._account(outputs, _cost(func, args, kwargs, out, outputs))
        return out

    def _account(self, outputs: list[Tensor], operation: Operation | None) -> None:
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._allocate(storage)
        self._look_for_a_peak()
        if operation is not None:
            self.operations[operation] += 1

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = -(-storage.nbytes() // self._block) * self._block
        self._storages[key] = weakref.ref(storage, partial(self._free, key)), "activations", size
        self.live["activations"] += size

    def _free(self, key: int, _: Any) -> None:
        _, kind, size = self._storages.pop(key)
        self.live[kind] -= size

    def _totals(self) -> tuple[int, int]:
        total = sum(self.live.values())
        return total, total - self.live["gradients"]

    def _look_for_a_peak(self) -> None:
        total, without = self._totals()
        if total > self._most:
            self._most, self.peak = total, Counter(self.live)
        if without > self._most_without:
            self._most_without, self.peak_without_gradients = without, Counter(self.live)


class _Made(NamedTuple):
    """How to make a new tensor on meta."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Made:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def again(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class _Known(NamedTuple):
    """An operator that has been seen with such arguments: PyTorch's rules for meta take most of a trace's time."""

    operation: Operation | None
    outputs: tuple[_Made, ...]
    kind: type


def _what_returns(func: Any) -> str:
    """ "new" tensors, "views" of its arguments, or "old" ones that it changes."""
    schema = func._schema
    if schema.is_mutable:
        return "old"
    if all(returned.alias_info is None for returned in schema.returns):
        return "new"
    return "old" if func._overloadpacket in _FORMULAS else "views"


def _signature(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator's new tensors and cost depend on; None where that is more than shapes and numbers."""
    parts: list[Any] = [func]
    for value in (*args, *kwargs.items()):
        part = _describe(value)
        if part is None:
            return None
        parts.append(part)
    return tuple(parts)


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        # The storage's size bounds what is read of an expanded tensor.
        return (value.shape, value.stride(), value.dtype, value.untyped_storage().nbytes()) if value.is_meta else None
    if isinstance(value, (list, tuple)):
        parts = tuple(_describe(item) for item in value)
        return None if None in parts else parts
    return type(value), value  # 1, 1.0 and True are equal, and mean other types


def _is_alike(out: Any) -> bool:
    """Whether `_Known` can make it: a tensor, or several, all of them on meta and their own."""
    items = out if type(out) in (tuple, list) else [out]
    return bool(items) and all(
        type(item) is Tensor and item.is_meta and item.storage_offset() == 0
        and item.untyped_storage().nbytes() == _Made.of(item).again().untyped_storage().nbytes()
        for item in items
    )  # fmt: skip


def _cost(func: Any, args: Any, kwargs: Any, out: Any, outputs: list[Tensor]) -> Operation | None:
    """None of a view."""
    formula = _FORMULAS.get(func._overloadpacket)
    flops = formula(*args, **kwargs, out_val=out) if formula else 0
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    read = {tensor.untyped_storage()._cdata for tensor in inputs}
    is_view = all(t.untyped_storage()._cdata in read for t in outputs) and not func._schema.is_mutable
    if is_view and not flops:
        return None
    moved = sum(_touched(tensor) for tensor in (*inputs, *outputs))
    is_half = any(t.dtype in (torch.float16, torch.bfloat16) for t in inputs)
    return Operation(int(flops), moved, is_half)


def _touched(tensor: Tensor) -> int:
    """Bytes behind a tensor; an expanded one is read from its few elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_RETURNS: dict[Any, str] = {}
# PyTorch has no formula for its CPU kernel.
_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
