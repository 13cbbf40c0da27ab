"""How much of the machine a training step uses, and how well `plan` foretells its time after one calibration.

    python -m benchmarks utilisation                     all
    python -m benchmarks.utilisation smoke_cut3r …       some recipes

The step is the recipe's own (forward, backward, clipping, optimiser, EMA) in float32 on one thread; FLOPs are counted
on the meta device, the peak is that of a square matrix product by the faster of PyTorch's two kernels, timed in turn
with the steps. The second kind of row calibrates at one batch, as `python -m cli plan --calibrate` does, and foretells
another. Times are the processor's.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Row, compare, environment, pin_threads, record
from cli.arguments import split
from cli.doctor import parse
from cli.plan_work import StepShape, Work
from restrike.models.layers.linear import linear
from restrike.plan import Device, StepCost
from restrike.plan.devices import this_machine
from restrike.plan.estimate import calibrated_efficiency, step_seconds

COMMAND = "python -m benchmarks utilisation"
CONF = Path(__file__).resolve().parents[1] / "conf"
MATMUL = 1536
ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """A recipe at two batches: (images,), or (views, scenes): where it is calibrated, and what is foretold."""

    recipe: str
    name: str
    calibrated: tuple[int, ...]
    foretold: tuple[int, ...]
    overrides: tuple[str, ...] = ()


CASES = (
    Case("quickstart", "the quickstart's FasterViT", (64,), (24,)),
    Case(
        "fastervit_0", "FasterViT-0", (4,), (2,),
        ("trainer=cpu", "--trainer.precision", "32-true", "~callbacks.mesa", "--data.batch_size_per_device", "4"),
    ),
    Case("smoke_vggt", "the small VGGT", (4, 4), (8, 1)),
    Case("smoke_cut3r", "the small CUT3R", (4, 4), (8, 2)),
    Case("smoke_diffusionsfm", "the small DiffusionSfM", (4, 16), (8, 4)),
)  # fmt: skip


def work_of(case: Case) -> Work:
    """On meta."""
    config = parse(split(["fit", "--config", str(CONF / f"{case.recipe}.yaml"), *case.overrides]))
    return Work(config, "cpu", samples=10_000)


def shape_of(work: Work, batch: tuple[int, ...]) -> StepShape:
    """A micro-batch."""
    if len(batch) == 1:
        return work.images(batch[0])
    views, scenes = batch
    return work.views(views, work.largest().size, scenes)


def describe(batch: tuple[int, ...]) -> str:
    """For the rows."""
    return f"{batch[0]} images" if len(batch) == 1 else f"{batch[1]} x {batch[0]} views"


def matmul() -> Callable[[], Tensor]:
    """The product that stands for the machine's peak."""
    a, b = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)

    def product() -> Tensor:
        with torch.inference_mode():
            return linear(a, b)

    return product


def rows_of(case: Case, machine: Device) -> list[Row]:
    """The share of the peak at the first batch, and the foretold time of the second."""
    work = work_of(case)
    shapes = [shape_of(work, batch) for batch in (case.calibrated, case.foretold)]
    first, second = (work.cost(shape) for shape in shapes)
    real = work.on_this_machine()
    calibration, foretold = (real.real_step(shape) for shape in shapes)
    timing = compare(calibration, matmul(), rounds=ROUNDS, warmup=1, clock=time.process_time)
    peaks = [2 * MATMUL**3 / seconds for seconds in timing.peer_s]
    shares = [first.flops / own / peak for own, peak in zip(timing.ours_s, peaks, strict=True)]
    low, share, high = statistics.quantiles(shares, n=4)
    peak = statistics.median(peaks)
    here = replace(machine, flops_float32=peak, flops_tf32=peak, flops_half=peak)
    both = compare(foretold, calibration, rounds=ROUNDS, warmup=1, clock=time.process_time)
    errors = [error_of(first, second, *times, here) for times in zip(both.peer_s, both.ours_s, strict=True)]
    lowest, error, highest = statistics.quantiles(errors, n=4)
    return [
        Row(
            name=f"Use of the machine: training step of {case.name}, {describe(case.calibrated)}",
            ratio=f"**{100 * share:.0f} % of the peak**",
            spread=f"{100 * low:.0f}–{100 * high:.0f} %",
            ours=f"{share * peak / 1e9:,.0f} GFLOP/s",
            peer=f"{peak / 1e9:,.0f} GFLOP/s (product of {MATMUL} x {MATMUL}, float32, one thread)",
            command=f"`{COMMAND}`",
        ),
        Row(
            name=f"Plan: step time of {case.name}, {describe(case.foretold)}, "
            f"calibrated at {describe(case.calibrated)}",
            ratio=f"**{error:+.0f} %**",
            spread=f"{lowest:+.0f} to {highest:+.0f} %",
            ours=f"{1e3 * statistics.median(both.ours_s):,.0f} ms",
            command=f"`{COMMAND}`",
        ),
    ]


def error_of(first: StepCost, second: StepCost, first_s: float, second_s: float, machine: Device) -> float:
    """Percent by which the second step's time is foretold too long, from the first's."""
    efficiency = calibrated_efficiency(first_s, first.operations, machine, tf32=False)
    return 100 * (step_seconds(second.operations, machine, tf32=False, efficiency=efficiency) / second_s - 1)


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pin_threads(1)
    machine = this_machine()
    chosen = [case for case in CASES if case.recipe in sys.argv[1:]] or CASES
    for case in chosen:
        record(*rows_of(case, machine), where=environment("timm", "lightning"))


if __name__ == "__main__":
    main()
