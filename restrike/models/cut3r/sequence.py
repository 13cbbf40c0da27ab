"""What goes from step to step of a rollout: encoded views, and what one view hands to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """Views after the encoder.

    Attributes:
        tokens: [B, V, N, enc_dim].
        grid: Rows and columns of patches.
        updates: [B, V] bool, which views write the state; None: all do.
        resets: [B, V] bool, after which views the state starts anew; None: after none.
        is_present: [B, V] bool, see `positions.view_positions`.
    """

    tokens: Tensor
    grid: tuple[int, int]
    updates: Tensor | None = None
    resets: Tensor | None = None
    is_present: Tensor | None = None

    def views(self, start: int, stop: int) -> Encoded:
        """A part of the sequence."""
        masks = (m if m is None else m[:, start:stop] for m in (self.updates, self.resets, self.is_present))
        return Encoded(self.tokens[:, start:stop], self.grid, *masks)


class Carry(NamedTuple):
    """What one view hands to the next.

    Attributes:
        state: [B, S, dim].
        memory: [B, M, 2 dim].
        first_state: Where a reset returns to.
        first_memory: Likewise.
        is_start: No view has been seen yet.
    """

    state: Tensor
    memory: Tensor
    first_state: Tensor
    first_memory: Tensor
    is_start: bool = True

    def detach(self) -> Carry:
        """Without its history: where truncated back-propagation cuts."""
        return Carry(
            self.state.detach(),
            self.memory.detach(),
            self.first_state.detach(),
            self.first_memory.detach(),
            self.is_start,
        )


def updated(carry: Carry, state: Tensor, memory: Tensor, encoded: Encoded, view: int) -> Carry:
    """The carry after a view: replaced where it updates, and started anew where it resets."""

    def choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        return torch.where(mask[:, view, None, None], yes, no.to(yes.dtype))

    if encoded.updates is not None:
        state, memory = choose(encoded.updates, state, carry.state), choose(encoded.updates, memory, carry.memory)
    if encoded.resets is not None:
        state = choose(~encoded.resets, state, carry.first_state)
        memory = choose(~encoded.resets, memory, carry.first_memory)
    return Carry(state, memory, carry.first_state, carry.first_memory, is_start=False)
