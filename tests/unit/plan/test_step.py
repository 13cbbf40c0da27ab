"""What is foretold on meta is what a real step does: FLOPs, saved tensors, casts, peak memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from restrike.models import build
from restrike.plan import StepCost, TrainingStep, trace_step
from restrike.plan.kernels import _attention, device_kernels
from restrike.plan.trace import Trace

SIDE, CLASSES = 64, 10
TINY = {
    "resolution": SIDE, "dim": 16, "in_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4],
    "window_size": [8, 8, 2, 2], "num_classes": CLASSES,
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*")


def network(device: str) -> nn.Module:
    with torch.device(device):
        return build("faster_vit_0_224", **TINY).train()


def planned(batch: int, **settings: Any) -> StepCost:
    net = settings.pop("net", None) or network("meta")
    with torch.device("meta"):
        optimizer = torch.optim.AdamW(net.parameters())
    return trace_step(
        TrainingStep(
            net=net,
            batch=lambda: torch.empty(batch, 3, SIDE, SIDE, device="meta"),
            loss=lambda images, _: net(images).square().mean(),
            optimizer=optimizer,
            **{"kind": "cpu"} | settings,
        )
    )


def real_step(batch: int) -> tuple[Callable[[], None], nn.Module]:
    torch.manual_seed(0)
    net = network("cpu")
    optimizer = torch.optim.AdamW(net.parameters())

    def step() -> None:
        loss = net(torch.randn(batch, 3, SIDE, SIDE)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    return step, net


def test_flops_are_those_of_a_counted_run():
    step, _ = real_step(8)
    with FlopCounterMode(display=False) as counter:
        step()
    assert planned(8).flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def saved_bytes(net: nn.Module, images: Tensor) -> Counter:
    """How many tensors of which type and size wait for the backward pass, weights aside."""
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(images)
    sizes = Counter((tensor.dtype, tensor.untyped_storage().nbytes()) for tensor in kept.values())
    return Counter({key: count for key, count in sizes.items() if key[1]})


def test_saved_tensors_are_those_of_a_real_forward_pass():
    # Not fewer images: the position tables are computed another way on a CPU, and keep 0.8 MB less.
    real = saved_bytes(network("cpu"), torch.randn(64, 3, SIDE, SIDE))
    with device_kernels("cpu", None):
        foretold = saved_bytes(network("meta"), torch.empty(64, 3, SIDE, SIDE, device="meta"))
    total = sum(size * count for (_, size), count in real.items())
    assert sum(size * count for (_, size), count in foretold.items()) == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("batch", [16, 64])  # 64: the quickstart's own step
def test_the_peak_is_that_of_the_allocator(batch):
    step, net = real_step(batch)
    standing = 4 * sum(p.numel() * p.element_size() for p in net.parameters())  # weights, gradients, two moments
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert sum(planned(batch).peak.values()) == pytest.approx(standing + most, rel=0.1)


class _OurAttention(TorchFunctionMode):
    """The GPU's attention kernels, which a fake device lacks; all else is left to PyTorch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        dtype = torch.get_autocast_dtype("cuda")
        return _attention("cuda", *(a.to(dtype) if isinstance(a, Tensor) else a for a in args), **(kwargs or {}))


def move_to_fake_gpu(net: nn.Module) -> None:
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, device="cuda")
                module._parameters[name] = nn.Parameter(fake)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, device="cuda", dtype=buffer.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_are_those_of_pytorchs_own_autocast_for_a_gpu(dtype):
    with device_kernels("cuda", dtype):
        ours = saved_bytes(network("meta"), torch.empty(4, 3, SIDE, SIDE, device="meta"))
    net = network("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_fake_gpu(net)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            with _OurAttention():
                theirs = saved_bytes(net, torch.empty(4, 3, SIDE, SIDE, device="cuda"))
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert {key[0] for key in theirs} >= {dtype, torch.float32}
    assert ours == theirs


def test_half_precision_halves_most_activations_and_leaves_the_rest():
    whole, half = planned(16, kind="cuda"), planned(16, kind="cuda", autocast=torch.bfloat16)
    assert 0.5 < half.saved_bytes / whole.saved_bytes < 0.75
    assert half.flops == whole.flops
    for kind in ("weights", "gradients", "optimizer"):
        assert half.peak[kind] == whole.peak[kind]


@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_checkpointing_keeps_less_and_computes_more(autocast):
    net = network("meta")
    whole = planned(32, net=net, kind="cuda", autocast=autocast)
    net.set_grad_checkpointing(True)
    again = planned(32, net=net, kind="cuda", autocast=autocast)
    assert again.saved_bytes < 0.5 * whole.saved_bytes
    assert again.peak["activations"] < 0.7 * whole.peak["activations"]
    assert 1.2 < again.flops / whole.flops < 4 / 3 + 0.01


def test_what_was_seen_before_is_not_worked_out_again_and_counts_the_same():
    def step(x: Tensor) -> Tensor:
        halves = torch.split(x.t() @ x, [3, 5])
        return F.layer_norm(halves[0] * 2, (8,)).sum() + (halves[1].expand(4, 5, 8) + 1.0).sum()

    with Trace() as once:
        step(torch.empty(4, 8, device="meta"))
    with Trace() as twice:
        results = [step(torch.empty(4, 8, device="meta")) for _ in range(2)]
    assert twice.operations == once.operations + once.operations
    assert [(r.shape, r.dtype, r.stride()) for r in results] == [((), torch.float32, ())] * 2
    assert twice.peak["activations"] <= once.peak["activations"] + 4
    ones, doubles = (torch.ones(4, dtype=dtype, device="meta") for dtype in (torch.float32, torch.float64))
    with Trace():
        assert [(ones * other).dtype for other in (2, doubles, 2.0)] == [torch.float32, torch.float64, torch.float32]


def test_parts_with_a_backward_pass_of_their_own_add_work_and_keep_no_activations():
    net = network("meta")

    def in_parts(images: Tensor, _: int) -> Tensor:
        for part in images[:-8].split(8):
            step.backward(net(part).square().mean())
        return net(images[-8:]).square().mean()

    def whole(images: Tensor, _: int) -> Tensor:
        return net(images).square().mean()

    costs = []
    for loss in (in_parts, whole):
        with torch.device("meta"):
            optimizer = torch.optim.AdamW(net.parameters())
        step = TrainingStep(net, lambda: torch.empty(24, 3, SIDE, SIDE, device="meta"), loss, optimizer, kind="cpu")
        costs.append(trace_step(step))
    parts, all_at_once = costs
    assert parts.flops == pytest.approx(all_at_once.flops, rel=0.02)  # tables of positions, three times
    assert parts.forward_flops == pytest.approx(all_at_once.forward_flops, rel=0.03)
    assert parts.saved_bytes < 0.4 * all_at_once.saved_bytes


def test_accumulated_batches_add_work_and_not_memory_and_state_is_counted_once():
    one, four = planned(8), planned(8, micro_batches=4)
    weights = sum(p.numel() for p in network("meta").parameters())
    assert one.all_gradients == 4 * weights
    assert one.peak["optimizer"] == pytest.approx(8 * weights, rel=0.01)
    assert four.flops == 4 * one.flops
    assert four.peak["activations"] == pytest.approx(one.peak["activations"], rel=0.1)
    assert four.peak["gradients"] >= one.peak["gradients"]


def test_frozen_weights_cost_no_gradients_and_no_backward_pass_of_their_own():
    net = network("meta")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    frozen = planned(8, net=net)
    assert frozen.all_gradients == 4 * sum(p.numel() for p in net.head.parameters())
    assert frozen.flops < 1.02 * frozen.forward_flops
    assert frozen.saved_bytes < 0.2 * planned(8).saved_bytes


def test_a_freed_tensor_leaves_the_live_bytes_and_stays_in_the_peak():
    with Trace() as trace:
        first = torch.empty(1000, device="meta")
        second = first + 1
        del first
        third = second * 2
        del second
    assert trace.peak["activations"] == 8000
    assert trace.live["activations"] == third.untyped_storage().nbytes() == 4000
