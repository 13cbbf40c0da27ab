"""A Linear that takes the faster of two CPU kernels in float32.

`torch.nn.functional.linear` calls MKL, which keeps to AVX2 on CPUs that are not Intel's; oneDNN, which PyTorch ships
too, uses their AVX-512 units. On an AMD EPYC (Zen 5) it does 230 against 105 GFLOP/s on FasterViT-0's shapes. The
choice follows from the machine and the size alone, so that a resumed run computes the same bits.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

# FLOPs of a product below which, in training, the way through Python to oneDNN (about 0.3 ms a layer, forward and
# backward) takes longer than its kernel saves.
_SMALL = 2**25


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN's kernel is the faster one here: AVX-512, not made by Intel, and the operator exists."""
    cpuinfo = Path("/proc/cpuinfo")
    maker = cpuinfo.read_text().partition("vendor_id")[2].partition("\n")[0] if cpuinfo.exists() else "GenuineIntel"
    return (
        platform.machine() in ("x86_64", "AMD64")
        and "GenuineIntel" not in maker
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _applies(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not prefers_onednn():
        return False  # compilers choose their own kernels, exporters want standard operators
    plain = (Tensor, nn.Parameter)
    return not torch.is_autocast_enabled("cpu") and all(
        t is None or (type(t) in plain and t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors
    )


class _OneDnnLinear(torch.autograd.Function):
    """x @ weight.T + bias for x [.., K], weight [N, K]; its backward is made of itself, so it can be differentiated."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _kernel(x, weight, bias, "none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        return torch.func.vmap(F.linear, in_dims=in_dims, randomness=info.randomness)(*operands), 0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = gradients
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (
            _OneDnnLinear.apply(grad, weight.t(), None) if needs_x else None,
            _OneDnnLinear.apply(flat.t(), x.flatten(0, -2).t(), None) if needs_weight else None,
            flat.sum(0) if ctx.has_bias and needs_bias else None,
        )


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    # "none" as algorithm of "gelu": exact (erf), not the tanh approximation.
    algorithm = "none" if activation == "gelu" else ""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _count_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * x_shape.numel() * weight_shape[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, through the faster kernel where there is a choice."""
    if x.ndim < 2 or not x.numel() or not _applies(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        if 2 * x.numel() * weight.shape[0] < _SMALL:
            return F.linear(x, weight, bias)
        return _OneDnnLinear.apply(x, weight, bias)
    return _kernel(x, weight, bias, "none")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(linear(x)), exact GELU; one kernel when no gradient is wanted."""
    if torch.is_grad_enabled() or not x.numel() or not _applies(x, weight, bias):
        return F.gelu(linear(x, weight, bias))
    return _kernel(x, weight, bias, "gelu")


class Linear(nn.Linear):
    """`nn.Linear` with `linear` for its forward."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
