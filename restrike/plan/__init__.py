"""What a training run will take, computed on the meta device before anything is booked."""

from restrike.plan.devices import DEVICES, Device
from restrike.plan.memory import GpuMemory, Parallelism, memory_per_gpu
from restrike.plan.step import StepCost, TrainingStep, trace_step

__all__ = [
    "DEVICES",
    "Device",
    "GpuMemory",
    "Parallelism",
    "StepCost",
    "TrainingStep",
    "memory_per_gpu",
    "trace_step",
]
