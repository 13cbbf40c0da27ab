"""VGGT: time and peak memory of a training step, ours beside a plain implementation that keeps every layer's output.

    python -m benchmarks vggt step                  # forward + backward at 2, 8 and 24 views: time and peak
    python -m benchmarks vggt memory                # peak by number of views: training, fine-tuning, inference
    python -m benchmarks vggt step --device cuda    # VGGT-1B's own width, bfloat16 autocast

Each peak is that of a fresh process above what it held when the model was built, so gradients count and weights do
not. The model has all of VGGT-1B's layers at a width that a CPU can train: 24 + 24 blocks and 4 taps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cut3r import plain_rotation
from benchmarks.harness import (
    Row,
    Timing,
    assert_close,
    clock_of,
    compare_forms,
    environment,
    pin_threads,
    record,
    resident_kib,
)
from benchmarks.targets import PARTS
from restrike.losses import LossWeights, MultiViewTargets, multiview_loss
from restrike.models import build
from restrike.models.layers.block import Block
from restrike.models.layers.linear import Linear
from restrike.models.layers.rotary import grid_positions

SIZE, STEP_SIZE = (112, 168), (84, 126)
VIEWS, STEP_VIEWS = (2, 12), (2, 8, 24)
SIZES: dict[str, Any] = {
    "img_size": 168, "embed_dim": 128, "depth": 24, "num_heads": 4, "taps": (4, 11, 17, 23), "patch_embed_depth": 4,
    "patch_embed_num_heads": 4, "camera_depth": 2, "camera_num_heads": 4, "dpt_features": 64,
    "dpt_out_channels": (32, 64, 128, 128),
}  # fmt: skip
# What happens to the network → how it is done.
TASKS = ("training", "fine-tuning", "inference")
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},  # every layer's output is kept, heads see all frames at once
    "kept": {"frames_per_chunk": 8},  # layers that heads read; the default
    "selective": {"frames_per_chunk": 8, "grad_checkpointing": "selective"},
    "checkpointed": {"frames_per_chunk": 2, "grad_checkpointing": True},
}


class PlainBlock(nn.Module):
    """A block as its description reads: PyTorch's own linear layer, rotary angles computed where they are used."""

    def __init__(self, block: Any, grid: tuple[int, int], num_special_tokens: int) -> None:
        super().__init__()
        self.block, self.grid, self.num_special_tokens = block, grid, num_special_tokens

    def forward(self, x: Tensor, rotary: object = None) -> Tensor:
        block, attention = self.block, self.block.attn
        qkv = F.linear(block.norm1(x), attention.qkv.weight, attention.qkv.bias)
        q, k, v = rearrange(qkv, "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=attention.num_heads)
        q, k = attention.q_norm(q), attention.k_norm(k)
        if rotary is not None:
            q, k = self._turn(q), self._turn(k)
        attended = rearrange(
            F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v), "b heads n d -> b n (heads d)"
        )
        x = x + block.ls1(F.linear(attended, attention.proj.weight, attention.proj.bias))
        hidden = F.gelu(F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias))
        return x + block.ls2(F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias))

    def _turn(self, x: Tensor) -> Tensor:
        patches = grid_positions(*self.grid, offset=1, device=x.device)
        frame = torch.cat([patches.new_zeros(self.num_special_tokens, 2), patches])
        positions = frame.repeat(x.shape[-2] // len(frame), 1)
        return plain_rotation(x, positions)


class Plain(nn.Module):
    """The same network and weights, run as its description reads: all 24 layers' tokens, then the heads on them."""

    def __init__(self, net: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.net = net
        grid = size[0] // net.patch_size, size[1] // net.patch_size
        for parent in list(net.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Block):
                    setattr(parent, name, PlainBlock(child, grid, net.aggregator.num_special_tokens))
                elif isinstance(child, Linear):
                    child.forward = nn.Linear.forward.__get__(child)  # type: ignore[method-assign]

    def forward(self, images: Tensor) -> dict[str, Any]:
        net: Any = self.net
        size = images.shape[-2], images.shape[-1]
        tokens = net.aggregator(images)
        encodings = net.camera_head(tokens[net.depth - 1][:, :, 0])
        patches = [tokens[i][:, :, net.aggregator.num_special_tokens :] for i in net.taps]
        depth, confidence = net.depth_head(patches, size)
        return {"pose_enc": encodings[-1], "pose_enc_list": encodings, "depth": depth, "depth_conf": confidence}


def network(form: str, task: str, size: tuple[int, int] = SIZE, sizes: dict[str, Any] = SIZES) -> nn.Module:
    """One form of the network, ready for a task."""
    torch.manual_seed(0)
    options = {"frames_per_chunk": 10_000, **FORMS[form]}
    net = build("vggt_1b_camera_depth", **{**sizes, **options}).train(task != "inference")
    if task == "fine-tuning":
        net.aggregator.requires_grad_(False).eval()
    return Plain(net, size) if form == "plain" else net


def scene(views: int, size: tuple[int, int] = SIZE, device: str = "cpu") -> tuple[Tensor, MultiViewTargets]:
    """Random images [1, V, 3, H, W] and targets."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, views
    depth = 1 + torch.rand(*shape, *size, generator=generator)
    intrinsics = torch.tensor([[150.0, 0, size[1] / 2], [0, 150.0, size[0] / 2], [0, 0, 1]]).expand(*shape, 3, 3)
    cameras = torch.eye(3, 4).expand(*shape, 3, 4)
    points = torch.zeros(*shape, *size, 3)
    images = torch.rand(*shape, 3, *size, generator=generator)
    tensors = (each.to(device) for each in (cameras, intrinsics, depth, points, depth > 0))
    return images.to(device), MultiViewTargets(*tensors)


def step(net: nn.Module, task: str, images: Tensor, targets: MultiViewTargets) -> dict[str, Any]:
    """A forward pass, and a backward pass in training; bfloat16 autocast on a GPU."""
    is_gpu = images.is_cuda
    with torch.set_grad_enabled(task != "inference"):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=is_gpu):
            predictions = net(images)
        if task != "inference":
            multiview_loss(predictions, targets, LossWeights())["loss"].backward()
    return predictions


def peak_mib(form: str, task: str, views: int, size: tuple[int, int]) -> float:
    """Peak resident memory of a step in this process above that before it, MiB. The process has to be fresh."""
    net = network(form, task, size)
    step(net, task, *scene(1, size))  # loads what kernels need
    net.zero_grad(set_to_none=True)
    images, targets = scene(views, size)
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is now
    before = resident_kib("VmRSS")
    step(net, task, images, targets)
    return (resident_kib("VmHWM") - before) / 1024


def measured(form: str, task: str, views: int, size: tuple[int, int] = SIZE) -> float:
    """`peak_mib` in a process of its own. Every large tensor is mapped by itself, so that it is given back at once."""
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    arguments = ["peak", form, task, str(views), *map(str, size)]
    command = [sys.executable, "-m", "benchmarks.vggt", *arguments]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    return float(done.stdout)


def check(size: tuple[int, int]) -> float:
    """Every form predicts the same and has the same gradients; the largest error."""
    images, targets = scene(3, size)
    expected: dict[str, Tensor] = {}
    errors = [0.0]
    for form in FORMS:
        net = network(form, "training", size)
        predictions = step(net, "training", images, targets)
        gradients = {
            name.replace(".block.", "."): p.grad.flatten() for name, p in net.named_parameters() if p.grad is not None
        }
        ordered = [gradients[name] for name in sorted(gradients, key=lambda name: name.removeprefix("net."))]
        values = {"pose_enc": predictions["pose_enc"], "depth": predictions["depth"], "gradients": torch.cat(ordered)}
        expected = expected or values
        errors += [assert_close(value.detach(), expected[name].detach(), 1e-4) for name, value in values.items()]
    return max(errors)


def growth(peaks: Iterable[float]) -> float:
    """MiB per view, between the fewest and the most views."""
    first, last = peaks
    return (last - first) / (VIEWS[-1] - VIEWS[0])


def measure_step() -> None:
    """Time of forward and backward, two forms of ours and the plain one in turn; peak of the form that saves memory."""
    error = check(STEP_SIZE)
    command, where = "python -m benchmarks vggt step", environment()
    title = f"VGGT forward + backward, 24 + 24 layers of width 128, {STEP_SIZE[0]}x{STEP_SIZE[1]}"
    nets = {form: network(form, "training", STEP_SIZE) for form in ("plain", "kept", "selective")}
    for views in STEP_VIEWS:
        checked = f"predictions and gradients within {error:.0e}"
        for form, timing in _timings(nets, *scene(views, STEP_SIZE)).items():
            name = f"{title}, {views} views, time, {form}"
            row = Row.of(timing, name=name, peer_name="every layer kept", checked=checked, command=command)
            record(row, where=where)
        plain, ours = (measured(form, "training", views, STEP_SIZE) for form in ("plain", "selective"))
        record(
            Row(
                name=f"{title}, {views} views, peak, selective",
                ratio=f"**{plain / ours:.2f}×**",
                ours=f"{ours / plain:.2f}× of the peer's, {ours:,.0f} MiB",
                peer=f"{plain:,.0f} MiB (every layer kept)",
                checked=checked,
                command=f"`{command}`",
            ),
            where=where,
        )


def measure_step_on_gpu(device: str) -> None:
    """The same with VGGT-1B's own sizes, bfloat16 autocast and PyTorch's count of the peak."""
    command, size, views = f"python -m benchmarks vggt step --device {device}", (350, 518), 8
    images, targets = scene(views, size, device)
    nets = {form: network(form, "training", size, {}).to(device) for form in ("plain", "kept", "selective")}
    peaks = {}
    for form, net in nets.items():
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(net, "training", images, targets)
        peaks[form] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        net.zero_grad(set_to_none=True)
    for form, timing in _timings(nets, images, targets, device).items():
        title = f"VGGT-1B forward + backward on {device}, {size[0]}x{size[1]}, {views} views"
        peer = f"every layer kept, peak {peaks['plain']:,.0f} MiB"
        checked = f"peak {peaks[form]:,.0f} MiB"
        record(Row.of(timing, name=f"{title}, {form}", peer_name=peer, checked=checked, command=command))


def _timings(
    nets: dict[str, nn.Module], images: Tensor, targets: MultiViewTargets, device: str = "cpu"
) -> dict[str, Timing]:
    def call(net: nn.Module) -> None:
        step(net, "training", images, targets)
        net.zero_grad(set_to_none=True)

    forms = {form: lambda net=net: call(net) for form, net in nets.items() if form != "plain"}
    return compare_forms(forms, lambda: call(nets["plain"]), clock=clock_of(device))


def measure_memory() -> None:
    """Peaks by number of views; prints one line per measurement for docs/models/vggt.md."""
    check(SIZE)
    where = environment()
    print(f"| task | form | {' | '.join(f'{v} views' for v in VIEWS)} | per view |")
    for task in TASKS:
        peaks = {}
        for form in FORMS if task == "training" else ("plain", "kept", "checkpointed")[: 2 + (task != "inference")]:
            peaks[form] = [measured(form, task, views) for views in VIEWS]
            cells = " | ".join(f"{peak:,.0f}" for peak in peaks[form])
            print(f"| {task} | {form} | {cells} | {growth(peaks[form]):.1f} |", flush=True)
        for form in [form for form in peaks if form != "plain"]:
            ours, plain = growth(peaks[form]), growth(peaks["plain"])
            record(
                Row(
                    name=f"VGGT memory per view, {task}, {form}",
                    ratio=f"**{plain / ours:.2f}×**",
                    ours=f"{ours:.1f} MiB/view, {peaks[form][-1]:,.0f} MiB at {VIEWS[-1]}",
                    peer=f"{plain:.1f} MiB/view, {peaks['plain'][-1]:,.0f} MiB at {VIEWS[-1]} (every layer kept)",
                    checked="predictions and gradients within 1e-4",
                    command="`python -m benchmarks vggt memory`",
                ),
                where=where,
            )


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        form, task, views, *size = sys.argv[2:]
        print(peak_mib(form, task, int(views), (int(size[0]), int(size[1]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS["vggt"])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pin_threads(1)
    if args.device != "cpu":
        measure_step_on_gpu(args.device)
    elif args.part == "step":
        measure_step()
    else:
        measure_memory()


if __name__ == "__main__":
    main()
