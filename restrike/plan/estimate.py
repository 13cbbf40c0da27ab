"""Time, data and money of a run, from the cost of its step and a device.

Without a given utilisation a step takes what a roofline says: each operator the longer of its arithmetic and its
memory traffic, at `EFFICIENCY` of the device's peaks, and no operator less than the host needs to launch it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from restrike.plan.devices import Device
from restrike.plan.trace import Operation

# Of kernels over the peak. The seven inference rates that arXiv 2306.06189 (Table 1) measured on an A100 come out
# within 12 % of it, in half precision at 128 images (docs/plan.md).
EFFICIENCY = 0.4
_MOST_EFFICIENT = 4.0  # a peak that was measured beside other work can be exceeded


@dataclass(frozen=True)
class Loading:
    """What a sample costs the loaders: an image, or a scene of several views.

    Attributes:
        samples_per_core_s: that one core decodes, crops and augments in a second.
        bytes_per_sample: read from storage.
    """

    samples_per_core_s: float
    bytes_per_sample: float


# Decoding, cropping and RandAugment at 224 px: docs/benchmarks.md, "Loader, full, wheels only"; and the mean JPEG of
# ImageNet-1k's training set, 138 GB / 1,281,167.
IMAGES = Loading(940.0, 108_000.0)


@dataclass(frozen=True)
class Phase:
    """Optimiser steps of equal cost; `name` says what sets them apart."""

    name: str
    steps: int
    operations: Counter[Operation]


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of a phase's mean step, and hours of all its steps."""

    name: str
    steps: int
    step_s: float
    hours: float


@dataclass(frozen=True)
class Run:
    """What a whole run takes.

    Attributes:
        step_s: seconds of the slowest phase's mean step.
        utilisation: of the peak for the type of each product, over the whole run.
        samples_per_s: over all ranks.
        loader_cores: per node, to keep up with the faster phase.
        bytes_per_s: of stored samples, per node.
    """

    steps: int
    step_s: float
    hours: float
    gpu_hours: float
    utilisation: float
    samples_per_s: float
    loader_cores: float
    bytes_per_s: float
    price: float | None
    phases: tuple[PhaseTime, ...] = ()


def roofline_s(operations: Counter[Operation], device: Device, tf32: bool, efficiency: float = EFFICIENCY) -> float:
    """Seconds of one device for these operators."""
    seconds = 0.0
    for operation, count in operations.items():
        arithmetic = operation.flops / device.peak(operation.is_half, tf32)
        work = max(arithmetic, operation.bytes / device.bandwidth) / efficiency
        seconds += count * (max(work, device.launch_s) if device.overlaps else work + device.launch_s)
    return seconds


def ideal_s(operations: Counter[Operation], device: Device, tf32: bool) -> float:
    """Seconds of the arithmetic alone, at the device's peak."""
    return sum(count * op.flops / device.peak(op.is_half, tf32) for op, count in operations.items())


def step_seconds(
    operations: Counter[Operation],
    device: Device,
    tf32: bool,
    utilisation: float | None = None,
    efficiency: float = EFFICIENCY,
) -> float:
    """Seconds of a step: by the given share of the peak, else by the roofline."""
    if utilisation is not None:
        return ideal_s(operations, device, tf32) / utilisation
    return roofline_s(operations, device, tf32, efficiency)


def calibrated_efficiency(seconds: float, operations: Counter[Operation], device: Device, tf32: bool) -> float:
    """The efficiency at which the roofline gives a measured time; other batches of the same network follow from it.

    A step that takes hardly longer than the launches of its operators gets the most that is sensible.
    """
    low, high = 1e-4, _MOST_EFFICIENT
    for _ in range(60):
        middle = (low * high) ** 0.5
        if roofline_s(operations, device, tf32, middle) > seconds:
            low = middle
        else:
            high = middle
    return high


def estimate_run(
    phases: Iterable[Phase],
    device: Device,
    *,
    tf32: bool,
    ranks: int,
    nodes: int,
    samples_per_step: float,
    loading: Loading,
    utilisation: float | None = None,
    efficiency: float = EFFICIENCY,
    price_per_gpu_hour: float | None = None,
) -> Run:
    """Sum the phases; `samples_per_step` counts all ranks and accumulated batches."""
    phases = [phase for phase in phases if phase.steps]
    times = [step_seconds(phase.operations, device, tf32, utilisation, efficiency) for phase in phases]
    parts = tuple(
        PhaseTime(phase.name, phase.steps, time, phase.steps * time / 3600)
        for phase, time in zip(phases, times, strict=True)
    )
    hours = sum(part.hours for part in parts)
    ideal = sum(phase.steps * ideal_s(phase.operations, device, tf32) for phase in phases)
    rate = samples_per_step / min(times)
    return Run(
        steps=sum(phase.steps for phase in phases),
        step_s=max(times),
        hours=hours,
        gpu_hours=hours * ranks,
        utilisation=ideal / (3600 * hours),
        samples_per_s=rate,
        loader_cores=rate / nodes / loading.samples_per_core_s,
        bytes_per_s=rate / nodes * loading.bytes_per_sample,
        price=None if price_per_gpu_hour is None else hours * ranks * price_per_gpu_hour,
        phases=parts,
    )
