"""Memory of one GPU, by what it holds, under each way of running in parallel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from restrike.plan.step import StepCost

Strategy = Literal["single", "ddp", "fsdp"]
OVERHEAD_BYTES = 10**9  # CUDA's context, NCCL's buffers and the libraries' workspaces: about 1 GB on an A100


@dataclass(frozen=True)
class Parallelism:
    """How a step is spread.

    Attributes:
        strategy: "single" process; "ddp", everything on every rank; "fsdp", weights, gradients and optimiser state
            split over all ranks.
        ranks: processes, one a GPU.
        bucket_views: DDP's `gradient_as_bucket_view`: gradients live in the buckets instead of beside them.
        largest_block_bytes: FSDP gathers weights block by block; of the largest of them.
        unblocked_bytes: FSDP keeps the weights outside of blocks gathered.
    """

    strategy: Strategy = "single"
    ranks: int = 1
    bucket_views: bool = False
    largest_block_bytes: int = 0
    unblocked_bytes: int = 0

    @classmethod
    def fsdp(cls, ranks: int, net: nn.Module, blocks: list[nn.Module]) -> Parallelism:
        """Of a network that is split by these blocks and as a whole."""
        sizes = [_parameter_bytes(block) for block in blocks]
        return cls("fsdp", ranks, True, max(sizes, default=0), _parameter_bytes(net) - sum(sizes))


@dataclass(frozen=True)
class GpuMemory:
    """Bytes at the peak of a step; `gathered` is what FSDP and the buckets of DDP add."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    batch: int
    activations: int
    gathered: int = 0
    overhead: int = OVERHEAD_BYTES

    @property
    def total(self) -> int:
        return sum(self.__dict__.values())


def memory_per_gpu(cost: StepCost, parallelism: Parallelism, overhead: int = OVERHEAD_BYTES) -> GpuMemory:
    """Of one rank."""
    if parallelism.strategy == "single":
        return _memory(cost.peak, overhead=overhead)
    if parallelism.strategy == "ddp":
        if parallelism.bucket_views:  # the buckets stay, also where a single process would have freed its gradients
            return _memory(cost.peak_without_gradients, gradients=cost.all_gradients, overhead=overhead)
        return _memory(cost.peak, gathered=cost.all_gradients, overhead=overhead)
    peak, ranks = cost.peak_without_gradients, parallelism.ranks
    # Two blocks at a time, as the next one is fetched early, and the gradients of one before they are spread.
    gathered = 3 * parallelism.largest_block_bytes + parallelism.unblocked_bytes
    split = Counter({**peak, **{kind: -(-peak[kind] // ranks) for kind in ("weights", "optimizer", "average")}})
    return _memory(split, gradients=-(-cost.all_gradients // ranks), gathered=gathered, overhead=overhead)


def most_that_fits(total: Callable[[int], int], room: int, refused: int, refused_total: int) -> int:
    """The largest size below `refused` whose total is at most `room`, to 2 %, by secants; 0 where 1 is too much.

    Args:
        total: Bytes at a size; grows with it.
        room: Bytes that there are.
        refused: A size that does not fit.
        refused_total: Its bytes.
    """
    low, low_total = 0, 0
    high, high_total = refused, refused_total
    probe = max(1, high // 2)
    while high - low > max(1, high // 50):
        size = total(probe)
        if size <= room:
            low, low_total = probe, size
        else:
            high, high_total = probe, size
        share = (room - low_total) / max(1, high_total - low_total)
        probe = high // 2 if low == 0 else min(max(low + int(share * (high - low)), low + 1), high - 1)
    return low


def _memory(
    peak: Counter, *, gradients: int | None = None, gathered: int = 0, overhead: int = OVERHEAD_BYTES
) -> GpuMemory:
    return GpuMemory(
        weights=peak["weights"],
        gradients=peak["gradients"] if gradients is None else gradients,
        optimizer=peak["optimizer"],
        average=peak["average"],
        batch=peak["batch"],
        activations=peak["activations"],
        gathered=gathered,
        overhead=overhead,
    )


def _parameter_bytes(net: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
