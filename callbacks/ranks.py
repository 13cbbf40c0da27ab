"""Collectives over a list of tensors. Without a process group they see one rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one float32 vector."""
    return torch.cat([t.detach().reshape(-1).float() for t in tensors]) if tensors else torch.zeros(0)


@torch.no_grad()
def unflatten_(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Write a vector from `flatten` back."""
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in one all-reduce. Every rank must call it."""
    _, size = world()
    if size == 1 or not tensors:
        return
    flat = flatten(tensors)
    dist.all_reduce(flat)
    unflatten_(tensors, flat / size)


def gather(tensors: Sequence[Tensor]) -> Tensor | None:
    """[ranks, entries] of every rank's tensors, or None when there is one rank. Every rank must call it."""
    _, size = world()
    if size == 1 or not tensors:
        return None
    flat = flatten(tensors)
    rows = [torch.empty_like(flat) for _ in range(size)]
    dist.all_gather(rows, flat)
    return torch.stack(rows)
