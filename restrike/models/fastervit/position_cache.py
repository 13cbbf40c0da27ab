"""Positional terms kept between evaluation forwards, for as long as the weights behind them stay as they are.

They depend on weights only, and are a tenth of the time of a small forward on a CPU, a third of its launches on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from restrike.models.fastervit.blocks import Positions, WindowBlock
from restrike.models.fastervit.positions import Grid

# Windows of 48x48 tokens need 4 GB a stage: above this size terms are kept by deployed models only.
_LIMIT_BYTES = 256 << 20
_MAX_GRIDS = 4
_SAMPLES = 16


class PositionCache:
    """One stage's terms, by grid of carrier windows.

    Valid while address, version and a few sampled values of every positional weight are the same. The samples find
    what versions do not count: writes through `weight.data`. They are left out on a GPU, where reading them would
    stall it. Copies and pickles start empty, but for what is frozen: the terms of a deployed model, which are never
    checked, and are there for compilers and exporters too.
    """

    def __init__(self) -> None:
        self._frozen: dict[Grid | None, list[Positions]] = {}
        self._state: Hashable = None
        self._samples: list[Tensor] = []
        self._sampled = torch.empty(0, device="cpu")
        self._terms: dict[Grid | None, list[Positions]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return PositionCache().__dict__ | {"_frozen": self._frozen}

    def get(
        self,
        blocks: Sequence[WindowBlock],
        grid: Grid | None,
        compute: Callable[[], Iterable[Positions]],
        num_bytes: int,
    ) -> Iterable[Positions]:
        """The terms of a stage's blocks; computed, and kept if they may be and need no more than a limit."""
        if grid in self._frozen:
            return self._frozen[grid]
        if blocks[0].training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return compute()
        if num_bytes > _LIMIT_BYTES or not self._revalidate(blocks):
            return compute()
        if grid not in self._terms:
            while len(self._terms) >= _MAX_GRIDS:
                del self._terms[next(iter(self._terms))]
            self._terms[grid] = list(compute())
        return self._terms[grid]

    @property
    def is_frozen(self) -> bool:
        return bool(self._frozen)

    def freeze(self, grid: Grid | None, terms: Iterable[Positions]) -> None:
        """Keep these terms for good."""
        self._frozen[grid] = list(terms)

    def _revalidate(self, blocks: Iterable[WindowBlock]) -> bool:
        """Empty the cache if a weight has changed; False where changes cannot be seen."""
        weights = _positional_weights(blocks)
        device = weights[0].device.type
        if device == "meta":  # has no values to keep, and no autocast state to ask for
            return False
        autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        try:
            state = (autocast, *((w.data_ptr(), w._version, w.dtype) for w in weights))
        except RuntimeError:  # inference tensors have no version, those inside torch.func's transforms no address
            return False
        is_readable = device == "cpu"
        if state == self._state and (not is_readable or torch.equal(torch.cat(self._samples), self._sampled)):
            return True
        self._state, self._terms = state, {}
        # Views: they also keep the storage, so that its address is not given to other weights.
        self._samples = [w.detach().flatten()[:: max(w.numel() // _SAMPLES, 1)] for w in weights]
        self._sampled = torch.cat(self._samples) if is_readable else self._sampled
        return True


def _positional_weights(blocks: Iterable[WindowBlock]) -> list[Tensor]:
    return [weight for block in blocks for mlp in block.positional_mlps() for weight in mlp.weights()]
