"""GPUs that recipes are planned for: peaks of their data sheets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        memory_bytes: of the whole device; 0 = unknown.
        flops_float32: dense peak per second in float32.
        flops_tf32: the same where float32 products may use TF32.
        flops_half: the same of bfloat16 and float16.
        bandwidth: bytes per second of its memory.
        launch_s: the host's time for one operator in eager mode.
        overlaps: the host launches the next operators meanwhile, so the device only waits where its work is shorter;
            a CPU is its own host and spends both.
    """

    name: str
    memory_bytes: int
    flops_float32: float
    flops_tf32: float
    flops_half: float
    bandwidth: float
    launch_s: float = 8e-6
    overlaps: bool = True

    def peak(self, is_half: bool, tf32: bool) -> float:
        """FLOP/s of products of that type."""
        return self.flops_half if is_half else self.flops_tf32 if tf32 else self.flops_float32


# NVIDIA's data sheets, SXM modules, dense (no sparsity).
DEVICES = {
    "a100-40": Device("A100 40 GB", 40 * GB, 19.5 * TERA, 156 * TERA, 312 * TERA, 1.555e12),
    "a100-80": Device("A100 80 GB", 80 * GB, 19.5 * TERA, 156 * TERA, 312 * TERA, 2.039e12),
    "h100": Device("H100 80 GB", 80 * GB, 67 * TERA, 494.7 * TERA, 989.4 * TERA, 3.35e12),
    "h200": Device("H200 141 GB", 141 * GB, 67 * TERA, 494.7 * TERA, 989.4 * TERA, 4.8e12),
}


def measure_matmul_peak(size: int = 1024, rounds: int = 9, device: str = "cpu", half: bool = False) -> float:
    """FLOP/s of the fastest of several square products on this machine, by the faster of its kernels."""
    from restrike.models.layers.linear import linear

    dtype = torch.bfloat16 if half else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with torch.inference_mode():
        return max(
            2 * size**3 / min(_seconds(lambda f=f: f(a, b), device) for _ in range(rounds))  # type: ignore[misc]
            for f in (torch.mm, linear)
        )


def measure_bandwidth(size: int = 1 << 26, rounds: int = 5, device: str = "cpu") -> float:
    """Bytes per second of a copy of `size` bytes, read and written."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(_seconds(lambda: target.copy_(source), device) for _ in range(rounds))


def measure_launch(layers: int = 32, rounds: int = 9) -> float:
    """Seconds of an operator of a training step that has next to nothing to compute, on this CPU."""
    from restrike.plan.trace import Trace

    parts = [part for _ in range(layers) for part in (nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())]
    net, x = nn.Sequential(*parts), torch.ones(4, 8)

    def step() -> None:
        (net(x) + x).mean().backward()

    step()
    with Trace() as trace:
        step()
    return min(_seconds(step, "cpu") for _ in range(rounds)) / sum(trace.operations.values())


def this_machine() -> Device:
    """The CPU here with the threads that torch has, measured in about a second."""
    peak = measure_matmul_peak()
    name = f"this CPU, {torch.get_num_threads()} thread(s)"
    return Device(name, 0, peak, peak, peak, measure_bandwidth(), launch_s=measure_launch(), overlaps=False)


def _seconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start
