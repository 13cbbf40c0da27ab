"""Truncated back-propagation through long sequences: which views, with and without gradients, in which chunks.

As published: chunks of four views, history cut between them, gradients in the last four chunks only. Encoder and
initial state come without gradients, so the state's tokens never train, and the first pose token only where the first
chunk is among the last four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from restrike.models.cut3r.heads import Predictions
from restrike.models.cut3r.model import CUT3R
from restrike.models.cut3r.sequence import Carry, Encoded


class Chunk(NamedTuple):
    """Views [start, stop) of a sequence."""

    start: int
    stop: int
    is_trained: bool


def chunks_of(views: int, size: int = 4, trained: int = 4) -> list[Chunk]:
    """Chunks of `size` views in order, the last one perhaps shorter; the last `trained` have gradients."""
    if size < 1 or trained < 1:
        raise ValueError(
            f"expected chunks of one view or more, and one trained chunk or more, got {size} and {trained}"
        )
    starts = range(0, views, size)
    first = len(starts) - trained
    return [Chunk(start, min(start + size, views), i >= first) for i, start in enumerate(starts)]


def run_chunk(net: CUT3R, encoded: Encoded, carry: Carry, chunk: Chunk) -> tuple[Predictions, Carry]:
    """Predictions [B, stop - start, ...] of a chunk and the carry after it, without history."""
    part = encoded.views(chunk.start, chunk.stop)
    with torch.set_grad_enabled(chunk.is_trained and torch.is_grad_enabled()):
        tokens, carry = net.rollout(part, carry.detach())
        return net.predict(tokens, part), carry.detach()


class TruncatedSequence:
    """Scenes on their way through truncated back-propagation: each call of `next_losses` is one trained chunk.

    Args:
        net: The model.
        encoded: All views, without gradients.
        losses_of: Predictions and first and last view of a chunk -> "loss" and its parts.
        size: See `chunks_of`.
        trained: See `chunks_of`.
    """

    def __init__(
        self,
        net: CUT3R,
        encoded: Encoded,
        losses_of: Callable[[Predictions, int, int], dict[str, Tensor]],
        size: int = 4,
        trained: int = 4,
    ) -> None:
        self.net, self.encoded, self.losses_of = net, encoded, losses_of
        self.chunks = chunks_of(encoded.tokens.shape[1], size, trained)
        self.seen: list[dict[str, Tensor]] = []  # losses of the chunks so far, without graph
        with torch.no_grad():
            self.carry = net.start(len(encoded.tokens))
        while not self.chunks[len(self.seen)].is_trained:
            self.next_losses()

    @property
    def is_done(self) -> bool:
        """Every chunk has been run."""
        return len(self.seen) == len(self.chunks)

    def next_losses(self) -> dict[str, Tensor]:
        """Losses of the next chunk, with today's weights and the state that the chunks before have left."""
        chunk = self.chunks[len(self.seen)]
        predictions, self.carry = run_chunk(self.net, self.encoded, self.carry, chunk)
        losses = self.losses_of(predictions, chunk.start, chunk.stop)
        self.seen.append({name: value.detach().mean() for name, value in losses.items()})
        return losses

    def mean_losses(self) -> dict[str, Tensor]:
        """Mean over all chunks so far of each loss and part."""
        return {name: torch.stack([losses[name] for losses in self.seen]).mean() for name in self.seen[0]}
