"""`python -m cli plan`: what a run will take, before it is booked. Computed on the meta device; starts nothing."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import torch

from cli.arguments import split
from cli.doctor import parse
from cli.errors import UserError
from cli.plan_work import StepShape, Work
from restrike.plan.devices import DEVICES, Device, this_machine
from restrike.plan.estimate import EFFICIENCY, IMAGES_PER_CORE_S, Phase, Run, calibrated_efficiency, estimate_run
from restrike.plan.memory import OVERHEAD_BYTES, GpuMemory, memory_per_gpu
from restrike.plan.report import Plan, as_json, as_text, save_plot
from restrike.plan.step import StepCost

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
        raise argparse.ArgumentTypeError(f"a share between 0 and 1, got {text}")
    return value


def _positive(text: str) -> float:
    if (value := float(text)) <= 0:
        raise argparse.ArgumentTypeError(f"a number above 0, got {text}")
    return value


def _parser() -> _Options:
    parser = _Options(
        "python -m cli plan", description=__doc__, epilog=_EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", choices=[*DEVICES, "cpu"], help="default: a100-80, or cpu for a recipe of the CPU")
    parser.add_argument("--utilisation", type=_share, help="share of the device's peak; default: a roofline")
    parser.add_argument("--calibrate", action="store_true", help="measure one training step here first (--device cpu)")
    parser.add_argument("--samples", type=int, help="training samples an epoch, where the data is not here")
    parser.add_argument("--samples_per_core", type=_positive, default=IMAGES_PER_CORE_S, help="a second, of the loader")
    parser.add_argument("--price_per_gpu_hour", type=_positive, help="for the cost of the run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the plan as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="memory against batch or views (also into the JSON)")
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
    plan = make_plan(parse(arguments), options, Path(arguments.configs[-1]).stem)
    print(as_text(plan))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(as_json(plan))
    if options.plot is not None:
        save_plot(plan, options.plot)
    return 0 if plan.fits else 1


def make_plan(config: Any, options: argparse.Namespace, recipe: str) -> Plan:
    """Of a parsed fit config."""
    name = options.device or ("cpu" if config.trainer.accelerator == "cpu" else "a100-80")
    if options.calibrate and name != "cpu":
        raise UserError("plan: --calibrate measures a step on this machine: add --device cpu")
    if config.cpu_threads is not None and name == "cpu":
        torch.set_num_threads(config.cpu_threads)
    work = Work(config, "cpu" if name == "cpu" else "cuda", options.samples)
    device = this_machine() if name == "cpu" else DEVICES[name]
    shapes = work.shapes()
    plain = [work.cost(shape) for shape in shapes]
    taught = [work.cost(shape, with_teacher=True) for shape in shapes] if work.mesa else plain
    memories = [_memory(work, cost, name) for cost in taught]
    largest = max(range(len(memories)), key=lambda index: memories[index].total)
    samples = sum(shape.samples for shape in shapes) * work.accumulated
    per_step = samples / len(shapes) * work.layout.ranks
    efficiency = _calibrated(work, shapes[0], plain[0], device) if options.calibrate else EFFICIENCY
    parameters = list(work.net.parameters())
    return Plan(
        recipe=recipe,
        device=device,
        layout=work.layout.describe(),
        precision=str(config.trainer.precision or "32-true"),
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        batch_size_per_device=work.data.batch_size_per_device,
        samples_per_step=round(per_step),
        flops_per_sample=sum(cost.flops for cost in plain) / samples,
        forward_flops_per_sample=sum(cost.forward_flops for cost in plain) / samples,
        flops_per_step=sum(cost.flops for cost in plain) // len(plain),
        memory=memories[largest],
        saved_bytes=taught[largest].saved_bytes,
        run=_run(work, options, device, plain, taught, round(per_step), efficiency),
        curve=_curve(work, name, shapes) if options.plot else {},
        curve_unit="views per scene" if shapes[0].views > 1 else "images per GPU",
        notes=tuple(work.notes),
    )


def _memory(work: Work, cost: StepCost, device: str) -> GpuMemory:
    return memory_per_gpu(cost, work.parallelism(), 0 if device == "cpu" else OVERHEAD_BYTES)


def _run(
    work: Work,
    options: argparse.Namespace,
    device: Device,
    plain: list[StepCost],
    taught: list[StepCost],
    samples_per_step: int,
    efficiency: float,
) -> Run | None:
    steps = work.steps()
    if steps is None:
        return None
    phases = [_phase(count, costs) for count, costs in zip(steps, (plain, taught), strict=True)]
    return estimate_run(
        phases,
        device,
        tf32=work.tf32,
        ranks=work.layout.ranks,
        nodes=work.layout.nodes,
        samples_per_step=samples_per_step,
        utilisation=options.utilisation,
        efficiency=efficiency,
        samples_per_core_s=options.samples_per_core,
        price_per_gpu_hour=options.price_per_gpu_hour,
    )


def _phase(steps: int, costs: list[StepCost]) -> Phase:
    """Steps whose shapes come equally often: their mean cost."""
    operations: Counter = Counter()
    for cost in costs:
        operations.update(cost.operations)
    for operation in operations:
        operations[operation] /= len(costs)  # type: ignore[assignment]
    return Phase(steps, sum(cost.flops for cost in costs) // len(costs), operations)


def _curve(work: Work, device: str, shapes: list[StepShape]) -> dict[int, GpuMemory]:
    """Memory at a few sizes around the recipe's own."""
    if shapes[0].views == 1:
        own = work.data.batch_size_per_device
        sizes = {size: work.images(size) for size in sorted({max(2, own // 4), max(2, own // 2), own, 2 * own})}
    else:
        most = work.data.shape.max_views
        size = max((shape.size for shape in shapes), key=lambda side: side[0] * side[1])
        sizes = {views: work.views(views, size, 1) for views in sorted({2, max(2, most // 2), most})}
    return {
        size: _memory(work, work.cost(shape, with_teacher=work.mesa is not None), device)
        for size, shape in sizes.items()
    }


def _calibrated(work: Work, shape: StepShape, cost: StepCost, device: Device) -> float:
    """The efficiency of this machine at the recipe's own step, without MESA."""
    return calibrated_efficiency(work.on_this_machine().measure(shape), cost.operations, device, work.tf32)
