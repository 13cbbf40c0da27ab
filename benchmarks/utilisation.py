"""How much of the machine a training step uses, and how well `plan` foretells its time after one calibration.

    python -m benchmarks utilisation

Forward, backward, clipping and AdamW in float32 on one thread; FLOPs are counted on the meta device, the peak is that
of a square matrix product by the faster of PyTorch's two kernels, timed in turn with the steps. The second kind of row
calibrates at one batch size and foretells another. Times are the processor's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Row, compare, environment, pin_threads, record
from restrike.models import build
from restrike.models.layers.linear import linear
from restrike.plan import Device, StepCost, TrainingStep, trace_step
from restrike.plan.devices import measure_bandwidth, measure_matmul_peak
from restrike.plan.estimate import calibrated_efficiency, step_seconds

COMMAND = "python -m benchmarks utilisation"
MATMUL = 1536
TINY = {
    "resolution": 64, "dim": 16, "in_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4],
    "window_size": [8, 8, 2, 2], "num_classes": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network at two batch sizes: where it is calibrated, and what is foretold."""

    name: str
    model: str
    side: int
    batches: tuple[int, int]
    arguments: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("the quickstart's FasterViT", "faster_vit_0_224", 64, (64, 24), TINY),
    Case("FasterViT-0", "faster_vit_0_224", 224, (8, 4)),
)


def step_on(net: nn.Module, images: Tensor, targets: Tensor) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def step() -> None:
        loss = F.cross_entropy(net(images), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()

    return step


def cost_of(case: Case, batch: int) -> StepCost:
    """Of the same step, counted on meta."""
    with torch.device("meta"):
        net = build(case.model, **case.arguments).train()
        images = torch.empty(batch, 3, case.side, case.side)
        targets = torch.empty(batch, dtype=torch.int64)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    return trace_step(
        TrainingStep(
            net=net,
            batch=lambda: (images, targets),
            loss=lambda both: F.cross_entropy(net(both[0]), both[1]),
            optimizer=optimizer,
            clip=lambda: torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0),
            kind="cpu",
        )
    )


def rows_of(case: Case, bandwidth: float) -> list[Row]:
    """The share of the peak at the first batch size, and the foretold time of the second."""
    torch.manual_seed(0)
    net = build(case.model, **case.arguments).train()
    a, b = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)

    def product() -> Tensor:
        with torch.inference_mode():
            return linear(a, b)

    first, second = case.batches
    costs = {batch: cost_of(case, batch) for batch in case.batches}
    steps = {
        batch: step_on(net, torch.randn(batch, 3, case.side, case.side), torch.zeros(batch, dtype=torch.int64))
        for batch in case.batches
    }
    timing = compare(steps[first], product, rounds=7, warmup=1, clock=time.process_time)
    peaks = [2 * MATMUL**3 / seconds for seconds in timing.peer_s]
    shares = [costs[first].flops / own / peak for own, peak in zip(timing.ours_s, peaks, strict=True)]
    low, share, high = statistics.quantiles(shares, n=4)
    both = compare(steps[second], steps[first], rounds=7, warmup=1, clock=time.process_time)
    peak = statistics.median(peaks)
    machine = Device("here", 0, peak, peak, peak, bandwidth, launch_s=0.0)
    errors = []
    for measured, calibration in zip(both.ours_s, both.peer_s, strict=True):
        efficiency = calibrated_efficiency(calibration, costs[first].operations, machine, tf32=False)
        foretold = step_seconds(costs[second].operations, machine, tf32=False, efficiency=efficiency)
        errors.append(100 * (foretold / measured - 1))
    lowest, error, highest = statistics.quantiles(errors, n=4)
    return [
        Row(
            name=f"Use of the machine: training step of {case.name}, batch {first}",
            ratio=f"**{100 * share:.0f} % of the peak**",
            spread=f"{100 * low:.0f}–{100 * high:.0f} %",
            ours=f"{share * peak / 1e9:,.0f} GFLOP/s",
            peer=f"{peak / 1e9:,.0f} GFLOP/s (product of {MATMUL} x {MATMUL}, float32, one thread)",
            command=f"`{COMMAND}`",
        ),
        Row(
            name=f"Plan: step time of {case.name}, batch {second}, calibrated at batch {first}",
            ratio=f"**{error:+.0f} %**",
            spread=f"{lowest:+.0f} to {highest:+.0f} %",
            ours=f"{1e3 * statistics.median(both.ours_s):,.0f} ms",
            command=f"`{COMMAND}`",
        ),
    ]


def main() -> None:
    pin_threads(1)
    assert measure_matmul_peak(256, rounds=2) > 0
    bandwidth = measure_bandwidth()
    for case in CASES:
        record(*rows_of(case, bandwidth), where=environment())


if __name__ == "__main__":
    main()
