"""A plan as text, as JSON, and as a picture of memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from restrike.plan.devices import DEVICES, GB, Device
from restrike.plan.estimate import Run
from restrike.plan.memory import GpuMemory

_CURVES = ("activations", "batch", "gradients", "optimizer", "average", "weights", "gathered", "overhead")


@dataclass(frozen=True)
class PhaseSummary:
    """Steps of equal cost: how many (None: unknown), parameters trained, FLOPs of the mean step, memory of the
    largest."""

    name: str
    steps: int | None
    trained: int
    flops_per_step: int
    memory: GpuMemory


@dataclass(frozen=True)
class Plan:
    """Everything that is known before launch.

    Attributes:
        trained: parameters, in the first phase; also the FLOPs, of its mean step without a teacher that comes later.
        batch: the largest, in words.
        typical: batches whose mean gives time and FLOPs, where they are not all alike.
        memory: at the peak of the largest step of the phase that takes most.
        phases: what changes in the run: frozen parameters, a teacher.
        fits_up_to: where it does not fit, the largest that would.
        curve: memory by batch size per device, or by views.
        curve_unit: what the curve's keys count.
        curve_mark: the recipe's own key.
        notes: what was assumed.
    """

    recipe: str
    device: Device
    layout: str
    precision: str
    parameters: int
    trained: int
    batch: str
    batch_size_per_device: int
    samples_per_step: float
    flops_per_sample: float
    forward_flops_per_sample: float
    flops_per_step: int
    memory: GpuMemory
    saved_bytes: int
    run: Run | None
    phases: tuple[PhaseSummary, ...] = ()
    fits_up_to: str = ""
    curve: Mapping[int, GpuMemory] = field(default_factory=dict)
    curve_unit: str = "images per GPU"
    curve_mark: int = 0
    notes: tuple[str, ...] = ()
    typical: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the peak is less than the device has; True where that is not known."""
        return not self.device.memory_bytes or self.memory.total <= self.device.memory_bytes


def as_text(plan: Plan) -> str:
    """The report, a line a fact."""
    memory, device = plan.memory, plan.device
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser": memory.optimizer,
        "EMA": memory.average,
        "batch": memory.batch,
        "activations": memory.activations,
        "gathered and buckets": memory.gathered,
        "CUDA and libraries": memory.overhead,
    }
    verdict = "" if not device.memory_bytes else f" of {_bytes(device.memory_bytes)}: "
    verdict += "" if not device.memory_bytes else "fits" if plan.fits else "DOES NOT FIT"
    verdict += f"; {plan.fits_up_to}" if plan.fits_up_to else ""
    lines = [
        ("recipe", plan.recipe),
        ("on", f"{plan.layout}, {device.name}, {plan.precision}"),
        ("parameters", f"{plan.parameters / 1e6:,.1f} M, {plan.trained / 1e6:,.1f} M of them trained"),
        ("batch", plan.batch),
        *([("  mean of", ", ".join(plan.typical))] if plan.typical else []),
        (
            "FLOPs",
            f"{_flops(plan.flops_per_sample)} per sample ({_flops(plan.forward_flops_per_sample)} forward), "
            f"{_flops(plan.flops_per_step)} per step and GPU",
        ),
        ("memory per GPU", f"{_bytes(memory.total)}{verdict}"),
        *((f"  {name}", _bytes(size)) for name, size in parts.items() if size),
        *_phase_lines(plan),
        *(_run_lines(plan.run) if plan.run else []),
        *(("note", note) for note in plan.notes),
    ]
    return "\n".join(f"{name:<24}{text}" for name, text in lines)


def _phase_lines(plan: Plan) -> list[tuple[str, str]]:
    """Of a run that has more than one."""
    if len(plan.phases) < 2:
        return []
    times = {phase.name: phase for phase in plan.run.phases} if plan.run else {}
    lines = []
    for phase in plan.phases:
        time = times.get(phase.name)
        runs = "" if time is None else f", {time.step_s * 1e3:,.0f} ms x {time.steps:,} steps = {_hours(time.hours)}"
        lines.append(("phase", f"{phase.name}: {_bytes(phase.memory.total)}{runs}"))
    return lines


def _run_lines(run: Run) -> list[tuple[str, str]]:
    price = "" if run.price is None else f", {run.price:,.0f} for the run"
    return [
        ("step", f"{run.step_s * 1e3:,.0f} ms, {run.utilisation:.1%} of the peak, {run.samples_per_s:,.3g} samples/s"),
        ("run", f"{run.steps:,} steps, {_hours(run.hours)}, {run.gpu_hours:,.0f} GPU-hours{price}"),
        ("data per node", f"{run.bytes_per_s / 1e6:,.3g} MB/s from storage, {run.loader_cores:,.2g} cores of loaders"),
    ]


def as_json(plan: Plan) -> str:
    """The same numbers, in bytes, seconds and FLOPs."""
    record: dict[str, Any] = asdict(plan)
    record["fits"] = plan.fits
    record["memory"]["total"] = plan.memory.total
    for phase, summary in zip(record["phases"], plan.phases, strict=True):
        phase["memory"]["total"] = summary.memory.total
    record["curve"] = {str(size): asdict(memory) | {"total": memory.total} for size, memory in plan.curve.items()}
    return json.dumps(record, indent=1) + "\n"


def save_plot(plan: Plan, file: Path) -> None:
    """Memory against the batch or the views, stacked by what holds it, with what GPUs have."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes = sorted(plan.curve)
    shown = [name for name in reversed(_CURVES) if any(getattr(plan.curve[size], name) for size in sizes)]
    heights = [[getattr(plan.curve[size], name) / GB for size in sizes] for name in shown]
    axes.stackplot(sizes, heights, labels=shown, alpha=0.85)
    most = max(plan.curve[size].total for size in sizes) / GB
    for device in {known.memory_bytes: known for known in DEVICES.values()}.values():
        if device.memory_bytes / GB < 1.6 * most:
            axes.axhline(device.memory_bytes / GB, color="black", linestyle="--", linewidth=0.8)
            axes.annotate(
                f"{device.memory_bytes / GB:.0f} GB", (sizes[-1], device.memory_bytes / GB), va="bottom", ha="right"
            )
    if plan.curve_mark in plan.curve:
        axes.axvline(plan.curve_mark, color="black", linewidth=0.8)
    axes.set(xlabel=plan.curve_unit, ylabel="GB per GPU at the peak", title=f"{plan.recipe}, {plan.precision}")
    axes.set_xlim(sizes[0], sizes[-1])
    axes.legend(loc="upper left", frameon=False, reverse=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _bytes(size: float) -> str:
    return f"{size / GB:,.2f} GB" if size >= GB / 10 else f"{size / 1e6:,.1f} MB"


def _flops(count: float) -> str:
    for factor, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count / 1e6:,.1f} MFLOP"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:,.1f} minutes"
    return f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"
