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
        loss: forward pass and loss of a micro-batch, given with its number in the step; a scalar. It may call
            `backward` for parts of the batch that have a backward pass of their own.
        optimizer: over parameters of `net`; None for a forward and backward pass alone.
        update: takes the optimiser's step, or several, with a closure that computes the gradients; None:
            `optimizer.step(closure)`.
        zero_grad: frees the gradients of the step before; None: of all parameters.
        clip: clips gradients before the update.
        average: network that follows `net` (EMA), and what moves it.
        micro_batches: accumulated per step.
        autocast: type of "16-mixed" or "bf16-mixed"; None otherwise.
        kind: of the device whose kernels are meant.
        on_backward: called before and after each backward pass; `trace_step` looks at memory and FLOPs there.
    """

    net: nn.Module
    batch: Callable[[], Any]
    loss: Callable[[Any, int], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    update: Callable[[Callable[[], None]], Any] | None = None
    zero_grad: Callable[[], None] | None = None
    clip: Callable[[], Any] | None = None
    average: nn.Module | None = None
    move_average: Callable[[], None] | None = None
    micro_batches: int = 1
    autocast: torch.dtype | None = None
    kind: DeviceKind = "cuda"
    on_backward: Callable[[bool], None] = lambda is_over: None

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, with the device's kernels also for what checkpointing computes again in it: the public
        function leaves every such context while it runs."""
        self.on_backward(False)
        with device_kernels(self.kind, None):
            _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), accumulate_grad=True)
        self.on_backward(True)

    def compute_gradients(self, batch: Any, number: int) -> None:
        """Forward and backward pass of a micro-batch. Lightning frees the old gradients between them, not before."""
        with device_kernels(self.kind, self.autocast):
            loss = self.loss(batch, number)
        if number == 0:
            if self.zero_grad is not None:
                self.zero_grad()
            else:
                self.net.zero_grad()
        self.backward(loss)

    def finish(self, batch: Any, number: int) -> None:
        """The last micro-batch, and the update that follows it."""

        def closure() -> None:
            self.compute_gradients(batch, number)
            if self.clip is not None:
                self.clip()

        if self.optimizer is None:
            closure()
        elif self.update is not None:
            self.update(closure)
        else:
            self.optimizer.step(closure)  # type: ignore[arg-type]
        if self.move_average is not None:
            self.move_average()


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
            operations, forward_flops, saved = _run(step, trace)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
    return StepCost(
        flops=sum(operation.flops * count for operation, count in operations.items()),
        forward_flops=forward_flops,
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


def _run(step: TrainingStep, trace: Trace) -> tuple[Counter[Operation], int, int]:
    """(operators, FLOPs outside of backward passes, activation bytes when one of these began)."""
    watch = _Backward(trace)
    step.on_backward = watch
    passes = min(2, step.micro_batches)  # what is accumulated beyond two micro-batches adds work, not memory
    a_pass, forward_flops = Counter[Operation](), 0
    for number in range(passes):
        batch = step.batch()
        trace.name("batch", (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))
        if number < passes - 1:
            step.compute_gradients(batch, number)
            a_pass, forward_flops = Counter(trace.operations), trace.flops - watch.flops
        else:
            step.finish(batch, number)
        del batch
    more = step.micro_batches - passes
    operations = trace.operations + Counter({operation: more * count for operation, count in a_pass.items()})
    return operations, trace.flops - watch.flops + more * forward_flops, watch.saved


class _Backward:
    """FLOPs of the backward passes, and the activations that wait for the one that finds the most."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._before = trace, 0
        self.flops = self.saved = 0

    def __call__(self, is_over: bool) -> None:
        if is_over:
            self.flops += self._trace.flops - self._before
        else:
            self._before = self._trace.flops
            self.saved = max(self.saved, self._trace.live["activations"])


def _tensors(net: nn.Module) -> Iterator[Tensor]:
    yield from net.parameters()
    yield from net.buffers()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
