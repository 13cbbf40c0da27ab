"""Exponential moving average of a network's weights, equal bit by bit to timm's `ModelEmaV3`.

Every floating state-dict entry moves, BatchNorm statistics included; integers are copied. There is no warm-up and no
bias correction: the average starts from the weights that it is given.

A tensor that stands in the state dict under two names moves twice per update, because the release of FasterViT (and
timm) walk over names: its carrier-token convolution has two. Buffers that can be computed from the parameters
(`derived_buffers` of a module, which for FasterViT at 768 pixels are 4.9 GB) are neither averaged nor saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn


def averaged_names(net: nn.Module) -> list[str]:
    """State-dict names without the modules' `derived_buffers`, in order; both names of a shared tensor."""
    derived = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in net.named_modules(remove_duplicate=False)
        for name in getattr(module, "derived_buffers", ())
    }
    return [name for name in net.state_dict(keep_vars=True) if name not in derived]


class WeightAverage:
    """A copy of `net` in eval mode, without gradients, that follows it: e ← decay · e + (1 − decay) · v.

    Args:
        net: What to follow; deep-copied.
        decay: Weight of the old average, in [0, 1].
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"expected an EMA decay in [0, 1], got {decay}")
        self.decay = decay
        self.module: nn.Module = deepcopy(net).eval().requires_grad_(False)
        self.bind(net)

    def bind(self, net: nn.Module) -> None:
        """Look up the tensors of both networks again; needed after a move to another device, or a new buffer."""
        ours, theirs = self.module.state_dict(keep_vars=True), net.state_dict(keep_vars=True)
        rounds: list[list[tuple[Tensor, Tensor]]] = []
        seen: dict[int, int] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        for name in averaged_names(self.module):
            pair = ours[name], theirs[name]
            if not pair[0].is_floating_point():
                self._copies.append(pair)
                continue
            # The second name of a tensor goes into a second call: twice in one fused kernel would be a race.
            turn = seen[id(pair[0])] = seen.get(id(pair[0]), -1) + 1
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(pair)
        self._rounds = [([a for a, _ in pairs], [b for _, b in pairs]) for pairs in rounds]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average one step towards the network."""
        for averages, values in self._rounds:
            torch._foreach_lerp_(averages, values, weight=1.0 - self.decay)
        for average, value in self._copies:
            average.copy_(value)

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the past: copy the network as it is now."""
        for averages, values in self._rounds:
            torch._foreach_copy_(averages, values)
        for average, value in self._copies:
            average.copy_(value)

    def buffers(self) -> list[Tensor]:
        """The floating buffers that are averaged: BatchNorm's running statistics, as a rule."""
        names = set(averaged_names(self.module))
        return [b for name, b in self.module.named_buffers() if name in names and b.is_floating_point()]

    def state_dict(self) -> dict[str, Tensor]:
        """The average under the network's names, without derived buffers; the tensors are not copied."""
        state = self.module.state_dict()
        return {name: state[name] for name in averaged_names(self.module)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fill the average in place.

        Raises:
            ValueError: the names or shapes are not those of this network.
        """
        own = self.state_dict()
        wrong = [
            n for n in own.keys() | state.keys() if n not in own or n not in state or own[n].shape != state[n].shape
        ]
        if wrong:
            raise ValueError(
                f"the saved weight average does not fit this network: {len(wrong)} entries are missing, unexpected or "
                f"of another shape, first {sorted(wrong)[:3]}; was model_name or one of model_args changed?"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
