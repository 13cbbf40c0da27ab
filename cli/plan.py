"""`python -m cli plan`: what a run will take, before it is booked. Computed on the meta device; starts nothing."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from cli.arguments import split
from cli.doctor import parse
from cli.errors import UserError, did_you_mean
from cli.plan_run import RunPhase, loading_of
from cli.plan_work import StepShape, Work
from restrike.plan.devices import DEVICES, Device, this_machine
from restrike.plan.estimate import EFFICIENCY, Phase, Run, calibrated_efficiency, estimate_run
from restrike.plan.memory import OVERHEAD_BYTES, GpuMemory, memory_per_gpu, most_that_fits
from restrike.plan.report import PhaseSummary, Plan, as_json, as_text, save_plot
from restrike.plan.step import StepCost
from restrike.plan.trace import Operation

_MANY_VIEWS = 16
_PICTURES = (".png", ".pdf", ".svg")
_EPILOG = """\
Beside these options the line takes what `fit` takes: overrides of the recipe (model=fastervit_4, trainer=fsdp) and
options of its parts (--data.batch_size_per_device 64, --trainer.num_nodes 2, --model.grad_checkpointing true).

Without --utilisation a step takes what a roofline says, at 40 % of the device's peaks; docs/plan.md says how good that
is. --device cpu is this machine, whose peak is measured.
"""


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"plan: {message}; python -m cli plan --help lists the options")


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text}")
    return value


def _positive(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text}")
    return value


def _device(text: str) -> str:
    known = [*DEVICES, "cpu"]
    if (name := text.lower()) not in known:
        alike = [device for device in known if device.startswith(name)]
        hint = f" Did you mean {' or '.join(alike)}?" if alike else did_you_mean(name, known)
        raise argparse.ArgumentTypeError(f"unknown device '{text}', expected one of {', '.join(known)}.{hint}")
    return name


def _picture(text: str) -> Path:
    if (file := Path(text)).suffix not in _PICTURES:
        raise argparse.ArgumentTypeError(f"expected a file that ends in {', '.join(_PICTURES)}, got '{text}'")
    return file


def _parser() -> _Options:
    parser = _Options(
        "python -m cli plan", description=__doc__, epilog=_EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = ", ".join([*DEVICES, "cpu"])
    parser.add_argument("--device", type=_device, help=f"{names}; default: a100-80, or cpu for a recipe of the CPU")
    parser.add_argument("--utilisation", type=_share, help="share of the device's peak; default: a roofline")
    parser.add_argument("--calibrate", action="store_true", help="measure one training step here first (--device cpu)")
    parser.add_argument("--samples", type=_count, help="training samples an epoch, where the data is not here")
    parser.add_argument("--samples_per_core", type=_positive, help="images or scenes a second of a loader's core")
    parser.add_argument("--price_per_gpu_hour", type=_positive, help="for the cost of the run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the plan as JSON")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="memory by batch or views (also into the JSON)")
    return parser


def main(argv: list[str]) -> int:
    """Print the plan; 1 where it does not fit into the device.

    Raises:
        UserError: one message for what the user can mend.
    """
    options, rest = _parser().parse_known_args(argv)
    arguments = split(["fit", *rest])
    if not arguments.configs:
        raise UserError("plan needs the line that you would give to fit: --config conf/….yaml …")
    if options.calibrate and options.utilisation is not None:
        raise UserError("plan: --calibrate measures what --utilisation gives: leave one of them out")
    with _quiet():
        plan = make_plan(parse(arguments), options, Path(arguments.configs[-1]).stem)
    print(as_text(plan))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(as_json(plan))
    if options.plot is not None:
        save_plot(plan, options.plot)
    return 0 if plan.fits else 1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what callbacks say when they change stages, which they do here only to be looked at."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def make_plan(config: Any, options: argparse.Namespace, recipe: str) -> Plan:
    """Of a parsed fit config."""
    name = options.device or ("cpu" if config.trainer.accelerator == "cpu" else "a100-80")
    if options.calibrate and name != "cpu":
        raise UserError("plan: --calibrate measures a step on this machine: add --device cpu")
    if config.cpu_threads is not None and name == "cpu":
        torch.set_num_threads(config.cpu_threads)
    work = Work(config, "cpu" if name == "cpu" else "cuda", options.samples)
    device = this_machine() if name == "cpu" else DEVICES[name]
    shapes, largest = work.shapes(), work.largest()
    phases = [_phase(work, phase, shapes, largest, name) for phase in work.phases]
    first, fullest = phases[0], max(phases, key=lambda phase: phase.memory.total)
    samples = work.samples_per_pass() * work.accumulated
    memory_of = partial(_total, work, name)
    work.enter(fullest.phase)
    fits_up_to = ""
    if device.memory_bytes and fullest.memory.total > device.memory_bytes:
        fits_up_to = what_fits(work, memory_of, device.memory_bytes, fullest.memory.total)
    curve = _curve(work, name, largest) if options.plot else {}
    efficiency = _efficiency(work, shapes, device, options)
    parameters = list(work.net.parameters())
    return Plan(
        recipe=recipe,
        device=device,
        layout=work.layout.describe(),
        precision=str(config.trainer.precision or "32-true"),
        parameters=sum(p.numel() for p in parameters),
        trained=first.trained,
        batch=_describe_batch(work, shapes, largest),
        typical=() if shapes == [largest] else tuple(shape.describe() for shape in shapes),
        batch_size_per_device=work.data.batch_size_per_device,
        samples_per_step=round(samples * work.layout.ranks, 1),
        flops_per_sample=first.flops / samples,
        forward_flops_per_sample=first.forward_flops / samples,
        flops_per_step=round(first.flops),
        memory=fullest.memory,
        saved_bytes=fullest.saved_bytes,
        phases=tuple(PhaseSummary(p.name, p.phase.steps, p.trained, round(p.flops), p.memory) for p in phases),
        run=_run(work, options, device, phases, samples * work.layout.ranks, efficiency),
        fits_up_to=fits_up_to,
        curve=curve,
        curve_unit=_curve_unit(work, largest),
        curve_mark=largest.views if largest.views > 1 else largest.samples,
        notes=tuple(work.notes),
    )


@dataclass(frozen=True)
class _Phase:
    """A phase of the run with the cost of its mean step and the memory of its largest."""

    phase: RunPhase
    name: str
    trained: int
    costs: list[StepCost]
    memory: GpuMemory
    saved_bytes: int

    @property
    def flops(self) -> float:
        return sum(cost.flops for cost in self.costs) / len(self.costs)

    @property
    def forward_flops(self) -> float:
        return sum(cost.forward_flops for cost in self.costs) / len(self.costs)

    @property
    def operations(self) -> Counter[Operation]:
        """Of the mean step; shapes come equally often."""
        operations: Counter = Counter()
        for cost in self.costs:
            operations.update(cost.operations)
        return Counter({operation: count / len(self.costs) for operation, count in operations.items()})  # type: ignore[misc]


def _phase(work: Work, phase: RunPhase, shapes: list[StepShape], largest: StepShape, device: str) -> _Phase:
    name = work.enter(phase)
    trained = sum(p.numel() for p in work.net.parameters() if p.requires_grad)
    costs = {shape: _cost(work, shape) for shape in {*shapes, largest}}
    memory = _memory(work, costs[largest], device)
    return _Phase(phase, name, trained, [costs[shape] for shape in shapes], memory, costs[largest].saved_bytes)


def _cost(work: Work, shape: StepShape) -> StepCost:
    """With a sign of life where it takes long."""
    if shape.views >= _MANY_VIEWS:
        print(f"plan: following a step of {shape.describe()} …", file=sys.stderr, flush=True)
    return work.cost(shape)


def _memory(work: Work, cost: StepCost, device: str) -> GpuMemory:
    return memory_per_gpu(cost, work.parallelism(), 0 if device == "cpu" else OVERHEAD_BYTES)


def _total(work: Work, device: str, shape: StepShape) -> int:
    return _memory(work, work.cost(shape), device).total


def _run(
    work: Work, options: argparse.Namespace, device: Device, phases: list[_Phase], samples: float, efficiency: float
) -> Run | None:
    if work.length.total is None:
        return None
    return estimate_run(
        [Phase(phase.name, phase.phase.steps or 0, phase.operations) for phase in phases],
        device,
        tf32=work.tf32,
        ranks=work.layout.ranks,
        nodes=work.layout.nodes,
        samples_per_step=samples,
        loading=loading_of(work.data, options.samples_per_core),
        utilisation=options.utilisation,
        efficiency=efficiency,
        price_per_gpu_hour=options.price_per_gpu_hour,
    )


def _efficiency(work: Work, shapes: list[StepShape], device: Device, options: argparse.Namespace) -> float:
    """Of this machine at the recipe's own first step where that is to be measured."""
    if not options.calibrate:
        return EFFICIENCY
    work.enter(work.phases[0])
    real = work.on_this_machine()
    real.enter(real.phases[0])
    return calibrated_efficiency(real.measure(shapes[0]), work.cost(shapes[0]).operations, device, work.tf32)


def _describe_batch(work: Work, shapes: list[StepShape], largest: StepShape) -> str:
    samples = work.samples_per_pass() * work.accumulated * work.layout.ranks
    if largest.views == 1:
        return f"{largest.samples:,} per GPU and pass, {samples:,.0f} samples a step"
    most = "" if shapes == [largest] else " at most"
    return f"{largest.describe()} per GPU and pass{most}; {samples:,.4g} scenes a step"


def what_fits(work: Work, memory_of: Callable[[StepShape], int], room: int, refused: int) -> str:
    """The key of the data that bounds memory, and the largest value of it that fits; what to try where none does."""
    for key, make, own in work.sizes():
        most = most_that_fits(lambda size, make=make: memory_of(make(size)), room, own, refused)  # type: ignore[misc]
        if most:
            return f"{key} {most} fits"
        refused = memory_of(make(1))
    return "not even one sample fits: try --model.grad_checkpointing true, trainer=fsdp, or a larger device"


def _curve(work: Work, device: str, largest: StepShape) -> dict[int, GpuMemory]:
    """Memory at a few sizes around the recipe's own."""
    return {size: _memory(work, work.cost(shape), device) for size, shape in work.curve(largest).items()}


def _curve_unit(work: Work, largest: StepShape) -> str:
    if largest.views == 1:
        return "images per GPU"
    height, width = largest.size
    return f"views per scene, {largest.samples} scene(s) of {height} x {width} per GPU"
