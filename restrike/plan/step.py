"""One optimiser step of a recipe, run on the meta device in the order of Lightning's loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.utils._pytree import tree_leaves

from restrike.plan.kernels import DeviceKind, device_kernels
from restrike.plan.trace import Kind, Operation, Trace


@dataclass
class TrainingStep:
    """What a training step consists of; every tensor lies on the meta device.

    Attributes:
        net: what is trained; parameters and buffers of it are weights.
        batch: makes one micro-batch, as the device gets it.
        loss: forward pass and loss of a micro-batch; a scalar.
        optimizer: over parameters of `net`; None for a forward and backward pass alone.
        clip: clips gradients before the update.
        average: network that follows `net` (EMA), and what moves it.
        micro_batches: accumulated per step.
        autocast: type of "16-mixed" or "bf16-mixed"; None otherwise.
        kind: of the device whose kernels are meant.
    """

    net: nn.Module
    batch: Callable[[], Any]
    loss: Callable[[Any], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    clip: Callable[[], Any] | None = None
    average: nn.Module | None = None
    move_average: Callable[[], None] | None = None
    micro_batches: int = 1
    autocast: torch.dtype | None = None
    kind: DeviceKind = "cuda"


@dataclass(frozen=True)
class StepCost:
    """Of one optimiser step on one device.

    Attributes:
        flops: floating-point operations, a multiply-add is two; recomputation by checkpointing included.
        forward_flops: of the forward passes alone, teacher included.
        operations: operators by cost, for estimates of time.
        peak: bytes by kind at the peak.
        peak_without_gradients: the same, had gradients no memory of their own.
        saved_bytes: activations that wait for the backward pass, at its beginning.
        all_gradients: bytes of one gradient for each trained parameter.
    """

    flops: int
    forward_flops: int
    operations: Counter[Operation]
    peak: Counter[Kind]
    peak_without_gradients: Counter[Kind]
    saved_bytes: int
    all_gradients: int


def trace_step(step: TrainingStep) -> StepCost:
    """Run a step on meta that is not the first: optimiser state exists, and old gradients are in the way."""
    trace = Trace(block=512 if step.kind == "cuda" else 1)
    trained = [p for p in step.net.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: trace.name("gradients", [p.grad])) for p in trained]
    try:
        with trace:
            trace.name("weights", _tensors(step.net))
            if step.average is not None:
                trace.name("average", _tensors(step.average))
            _leave_traces(step, trained, trace)
            trace.reset()
            forward_flops, saved = _run(step, trace)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    # What is accumulated beyond two micro-batches adds work, not memory.
    repeats = max(1, step.micro_batches / 2)
    operations = Counter({operation: round(count * repeats) for operation, count in trace.operations.items()})
    return StepCost(
        flops=round(trace.flops * repeats),
        forward_flops=round(forward_flops * repeats),
        operations=operations,
        peak=trace.peak,
        peak_without_gradients=trace.peak_without_gradients,
        saved_bytes=saved,
        all_gradients=sum(p.numel() * p.element_size() for p in trained),
    )


def _leave_traces(step: TrainingStep, trained: list[nn.Parameter], trace: Trace) -> None:
    """What an earlier step leaves: gradients and the optimiser's state."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        trace.name("gradients", [parameter.grad])
    if step.optimizer is not None:
        step.optimizer.step()
        trace.name("optimizer", _optimizer_tensors(step.optimizer))


def _run(step: TrainingStep, trace: Trace) -> tuple[int, int]:
    """(FLOPs of the forward passes, activation bytes at the end of a forward pass)."""
    forward_flops = saved = 0
    for number in range(min(2, step.micro_batches)):
        batch = step.batch()
        trace.name("batch", (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))
        before = trace.flops
        with device_kernels(step.kind, step.autocast):
            loss = step.loss(batch)
        forward_flops += trace.flops - before
        saved = max(saved, trace.live["activations"])
        if number == 0:  # Lightning frees the old gradients after the forward pass, not before it
            for parameter in step.net.parameters():
                parameter.grad = None
        _backward(loss, step.kind)
        del loss, batch
    if step.clip is not None:
        step.clip()
    if step.optimizer is not None:
        step.optimizer.step()
    if step.move_average is not None:
        step.move_average()
    return forward_flops, saved


def _backward(loss: Tensor, kind: DeviceKind) -> None:
    """`loss.backward()`, with the device's kernels also for what checkpointing computes again in it: the public
    function leaves every such context while it runs."""
    with device_kernels(kind, None):
        _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), accumulate_grad=True)


def _tensors(net: nn.Module) -> Iterator[Tensor]:
    yield from net.parameters()
    yield from net.buffers()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
