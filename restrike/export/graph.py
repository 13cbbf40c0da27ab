"""A network as a graph from images to named tensors, traced once with free batch (and view) sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from restrike.export.errors import ExportError

TOLERANCE = 1e-4  # of the largest value of an output, float32
_MULTIVIEW = ("vggt",)  # families; what names none, or another, is taken for a classifier
_MORE_THAN_IMAGES = ("cut3r", "diffusionsfm")


class TensorOutputs(nn.Module):
    """`net` with a tuple of tensors as its result, in the order of `names`.

    Of a dict of predictions the tensors count, but for the images themselves; lists (every round of a refinement,
    whose last is there by name) are left out.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.names: list[str] = []

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] or [B, V, 3, H, W] to tensors that begin with [B] or [B, V]."""
        found = self.net(images)
        outputs = {"logits": found} if isinstance(found, Tensor) else found
        named = {name: value for name, value in outputs.items() if isinstance(value, Tensor) and name != "images"}
        self.names = list(named)
        return tuple(named.values())


class _OrderedAttention(TorchFunctionMode):
    """Puts the result of fused attention into plain memory order.

    Each kernel has an order of its own. A graph that counts on it (a view where elsewhere a copy is needed) fails in
    decompositions, and on devices with other kernels.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.contiguous() if func is functional.scaled_dot_product_attention else result


def is_multiview(net: nn.Module, form: str) -> bool:
    """Whether the network takes [B, V, 3, H, W].

    Raises:
        ExportError: it is not one function from images to tensors.
    """
    family = getattr(net, "family", None)
    if family in _MORE_THAN_IMAGES:
        raise ExportError(
            f"{form} cannot carry {type(net).__name__}: the format holds one function from images to tensors, and "
            "this network takes more than images (a state, a noise level); export it as safetensors or hub"
        )
    return family in _MULTIVIEW


def example_images(net: nn.Module, size: tuple[int, int], form: str = "the graph", views: int = 3) -> Tensor:
    """Images of the shape that `net` takes, in [0, 1]: two of a batch, for a trace must not see a 1.

    Args:
        size: (H, W).
        form: the format's name, for messages.
        views: of a scene, where the network takes scenes.
    """
    lead = (2, views) if is_multiview(net, form) else (2,)
    channels = getattr(net, "in_chans", 3)
    return torch.rand(*lead, channels, *size, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def _ready(net: nn.Module) -> Iterator[None]:
    """In eval mode, and with all frames of a batch in one chunk: a loop over chunks would fix their number."""
    was_training = net.training
    chunked: dict[Any, Any] = {
        module: module.frames_per_chunk for module in net.modules() if hasattr(module, "frames_per_chunk")
    }
    try:
        net.eval()
        for module in chunked:
            module.frames_per_chunk = 1 << 20
        yield
    finally:
        net.train(was_training)
        for module, frames in chunked.items():
            module.frames_per_chunk = frames


def trace(net: nn.Module, images: Tensor, form: str) -> tuple[ExportedProgram, list[str]]:
    """The graph and the names of its outputs.

    Args:
        images: see `example_images`; its height and width become the graph's.
        form: the format's name, for messages.

    Raises:
        ExportError: torch.export cannot trace the network, or not with a free batch size.
    """
    outputs = TensorOutputs(net)
    sizes = dict.fromkeys((0, 1) if images.ndim == 5 else (0,), Dim.DYNAMIC)
    try:
        with _ready(net), torch.no_grad(), _OrderedAttention():
            outputs(images)  # names the outputs; what is wrong with the images the network says itself
            program = torch.export.export(outputs, (images,), dynamic_shapes=(sizes,), strict=False)
    except Exception as error:  # the tracer raises dozens of types
        raise ExportError(
            f"{form} cannot carry {type(net).__name__} at {list(images.shape)}: {first_line(error)}; export it as "
            "safetensors or hub"
        ) from error
    return program, outputs.names


def first_line(error: BaseException) -> str:
    """What an exporter's page-long report is about: the first line of the error behind it."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:300]}".rstrip(": ")


def check_outputs(
    run: Callable[[Tensor], Sequence[Tensor]], net: nn.Module, images: Tensor, names: Sequence[str], form: str
) -> Mapping[str, float]:
    """Compare what was exported with the network itself, at a batch of one and at one that was not traced.

    Returns:
        The largest error of each output over its own largest value.

    Raises:
        ExportError: an error above `TOLERANCE`.
    """
    worst = dict.fromkeys(names, 0.0)
    outputs = TensorOutputs(net)
    for batch in (images[:1], torch.cat([images, images[:1].flip(-1)])):
        with _ready(net), torch.no_grad():
            expected = outputs(batch)
        for name, ours, theirs in zip(names, expected, run(batch), strict=True):
            scale = ours.abs().max().clamp(min=torch.finfo(ours.dtype).tiny)
            error = (ours - theirs).abs().max() / scale if ours.shape == theirs.shape else scale.new_tensor(torch.inf)
            worst[name] = max(worst[name], float(error.nan_to_num(nan=torch.inf)))
    name = max(worst, key=lambda name: worst[name])
    if worst[name] > TOLERANCE:
        raise ExportError(
            f"{form}: the exported graph differs from the network by {worst[name]:.1e} in '{name}', more than "
            f"{TOLERANCE:.0e}; nothing was written. Export it as safetensors or hub"
        )
    return worst
