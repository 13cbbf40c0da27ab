"""Random number generators of every rank, in the checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed as dist

from callbacks.ranks import world


class RngState(Callback):
    """Saves torch's, CUDA's, NumPy's and Python's generators, and puts them back when training starts again.

    Restored in `on_train_start`: before the first batch, and before a callback that seeds each step, wherever it
    stands in the list. Validation does not advance the generators: what training draws depends on training alone.

    Lightning gives every rank the same seed, so all ranks would drop the same paths. A new run gives rank r > 0 its
    own streams (seed + r); rank 0 draws as a single process does.

    `state_dict` is a collective: every rank must take part in saving, as Lightning's own saving does.
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._restored: list[dict[str, Any]] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn which device's generator to keep."""
        self._device = pl_module.device

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with this rank's own streams, or begin them."""
        rank, size = world()
        states, self._restored = self._restored, None
        if states is not None and len(states) != size:
            rank_zero_warn(f"the checkpoint was saved by {len(states)} ranks, this run has {size}: new ones get seeds")
        if states is not None and rank < len(states):
            _restore(states[rank], self._device)
        elif rank > 0:
            _seed(torch.initial_seed() + rank)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where training's streams stand."""
        if trainer.state.fn == "fit":
            self._before_validation = _capture(self._device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them back."""
        if self._before_validation is not None:
            _restore(self._before_validation, self._device)
            self._before_validation = None

    def state_dict(self) -> dict[str, Any]:
        """Every rank's generators, in rank order; during a validation those from before it, as it will be repeated."""
        own = self._before_validation or _capture(self._device)
        _, size = world()
        ranks: list[Any] = [own]
        if size > 1:
            ranks = [None] * size
            dist.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._restored = state_dict["ranks"]


def _capture(device: torch.device) -> dict[str, Any]:
    """The generators as tensors and plain types, which load with `weights_only`."""
    _, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def _restore(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.cpu().numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


def _seed(seed: int) -> None:
    torch.manual_seed(seed)  # CUDA's too
    np.random.seed(seed % 2**32)
    random.seed(seed)
