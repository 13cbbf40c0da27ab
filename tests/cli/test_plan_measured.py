"""What is planned on meta is what a real step of the same recipe does here: FLOPs and peak memory, of each family."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cli.arguments import split
from cli.doctor import parse
from cli.plan_work import Work
from recipes import path
from restrike.models.layers import linear
from restrike.plan.batches import with_values

pytestmark = pytest.mark.filterwarnings("ignore:.*")

# PyTorch counts nothing for its CPU attention.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}
RECIPES = {
    "FasterViT": ("quickstart", "--data.batch_size_per_device", "16"),
    "VGGT": ("smoke_vggt",),
    "CUT3R": ("smoke_cut3r",),
    "DiffusionSfM": ("smoke_diffusionsfm",),
    "two parts, a frozen aggregator": ("vggt_co3d_finetune", "+smoke=vggt"),
    "chunks of long sequences, in parts": (
        "cut3r_stage4", "+smoke=cut3r", "--model.accum_steps", "2", "--model.trained_chunks", "2",
    ),
}  # fmt: skip
CHECKPOINTED = ("FasterViT", "VGGT", "CUT3R", "DiffusionSfM")


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch) -> None:
    """oneDNN's linear is a Python function, whose last call in a checkpointed block is computed again in vain."""
    monkeypatch.setattr(linear, "prefers_onednn", lambda: False)


@pytest.fixture(scope="module", params=RECIPES)
def case(request: Any, tmp_path_factory: Any) -> tuple[str, Work, Work]:
    """(name, planned, real) of the last phase."""
    name, *overrides = RECIPES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        planned = Work(parse(split(["fit", "--config", path(name), *overrides])), "cpu", samples=1000)
    real = planned.on_this_machine()
    for work in (planned, real):
        work.enter(work.phases[-1])
    return request.param, planned, real


def test_the_planned_step_is_the_real_one(case) -> None:
    name, planned, real = case
    cost = planned.cost(planned.largest())
    step = real.real_step(real.largest())
    assert cost.flops == pytest.approx(counted_flops(step), rel=0.001)
    assert not planned.notes or "stands for it" not in " ".join(planned.notes)
    standing = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept(real)}.values())
    assert sum(cost.peak.values()) == pytest.approx(standing + highest(step, real), rel=0.1), name


def test_checkpointing_computes_again_what_is_planned(case) -> None:
    name, planned, real = case
    if name not in CHECKPOINTED:
        pytest.skip("checkpointed by its recipe, or as the small one of its family")
    plain = planned.cost(planned.largest())
    for work in (planned, real):
        work.net.set_grad_checkpointing(True)
    again = planned.cost(planned.largest())
    assert 1.05 < again.flops / plain.flops < 1.4 and again.saved_bytes < 0.7 * plain.saved_bytes
    assert again.flops == pytest.approx(counted_flops(real.real_step(real.largest())), rel=0.001)


def counted_flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        step()
    return counter.get_total_flops()


def kept(real: Work) -> Iterator[Tensor]:
    """Tensors that stay from step to step, gradients aside; a batch among them."""
    yield from (*real.net.parameters(), *real.net.buffers())
    yield from (t for state in real.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    if real._average is not None:
        yield from (*real._average.shadow().parameters(), *real._average.shadow().buffers())
    yield from (t for t in tree_leaves(with_values(real.largest().make())) if isinstance(t, Tensor))


def highest(step: Callable[[], None], real: Work) -> int:
    """Bytes that two steps hold at once at most, beside what was there; the first one leaves its gradients."""
    for parameter in real.net.parameters():
        parameter.grad = None
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
