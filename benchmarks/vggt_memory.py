"""Peak memory of VGGT by number of views: ours beside a plain implementation that keeps every layer's output.

Each number is the peak of a fresh process above what it held when the model was built, so gradients count and weights
do not. The model has all of VGGT-1B's layers at a width that a CPU can train: 24 + 24 blocks and 4 taps.

python -m benchmarks vggt_memory
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, assert_close, environment, pin_threads, record
from restrike.losses import LossWeights, MultiViewTargets, multiview_loss
from restrike.models import build

COMMAND = "python -m benchmarks vggt_memory"
SIZE = (112, 168)
VIEWS = (2, 6, 12)
SIZES: dict[str, Any] = {
    "img_size": 168, "embed_dim": 128, "depth": 24, "num_heads": 4, "taps": (4, 11, 17, 23), "patch_embed_depth": 4,
    "patch_embed_num_heads": 4, "camera_depth": 2, "camera_num_heads": 4, "dpt_features": 64,
    "dpt_out_channels": (32, 64, 128, 128),
}  # fmt: skip
# What happens to the network → how it is done.
TASKS = ("training", "fine-tuning", "inference")
FORMS = {
    "plain": {},  # every layer's output is kept, heads see all frames at once
    "kept": {"frames_per_chunk": 8},  # layers that heads read; the default
    "checkpointed": {"frames_per_chunk": 2, "grad_checkpointing": True},
}


class Plain(nn.Module):
    """The same network and weights, run as its description reads: all 24 layers' tokens, then the heads on them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> dict[str, Any]:
        net: Any = self.net
        size = images.shape[-2], images.shape[-1]
        tokens = net.aggregator(images)
        encodings = net.camera_head(tokens[net.depth - 1][:, :, 0])
        patches = [tokens[i][:, :, net.aggregator.num_special_tokens :] for i in net.taps]
        depth, confidence = net.depth_head(patches, size)
        return {"pose_enc": encodings[-1], "pose_enc_list": encodings, "depth": depth, "depth_conf": confidence}


def network(form: str, task: str) -> nn.Module:
    """One form of the network, ready for a task."""
    torch.manual_seed(0)
    options = {"frames_per_chunk": 10_000, **FORMS[form]}
    net = build("vggt_1b_camera_depth", **{**SIZES, **options}).train(task != "inference")
    if task == "fine-tuning":
        net.aggregator.requires_grad_(False).eval()
    return Plain(net) if form == "plain" else net


def scene(views: int) -> tuple[Tensor, MultiViewTargets]:
    """Random images [1, V, 3, H, W] and targets."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, views
    depth = 1 + torch.rand(*shape, *SIZE, generator=generator)
    intrinsics = torch.tensor([[150.0, 0, SIZE[1] / 2], [0, 150.0, SIZE[0] / 2], [0, 0, 1]]).expand(*shape, 3, 3)
    cameras = torch.eye(3, 4).expand(*shape, 3, 4)
    points = torch.zeros(*shape, *SIZE, 3)
    targets = MultiViewTargets(cameras, intrinsics, depth, points, depth > 0)
    return torch.rand(*shape, 3, *SIZE, generator=generator), targets


def step(net: nn.Module, task: str, images: Tensor, targets: MultiViewTargets) -> dict[str, Any]:
    """A forward pass, and a backward pass in training."""
    with torch.set_grad_enabled(task != "inference"):
        predictions = net(images)
        if task != "inference":
            multiview_loss(predictions, targets, LossWeights())["loss"].backward()
    return predictions


def peak_mib(form: str, task: str, views: int) -> float:
    """Peak resident memory of a step in this process above that before it, MiB. The process has to be fresh."""
    net = network(form, task)
    images, targets = scene(views)
    before = _resident_kib("VmRSS")
    step(net, task, images, targets)
    return (_resident_kib("VmHWM") - before) / 1024


def _resident_kib(which: str) -> int:
    """Linux's count, "VmRSS" (now) or "VmHWM" (the most so far); rusage's holds the parent's before exec, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def measured(form: str, task: str, views: int) -> float:
    """`peak_mib` in a process of its own. Every large tensor is mapped by itself, so that it is given back at once."""
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.vggt_memory", form, task, str(views)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    return float(done.stdout)


def check() -> None:
    """Every form predicts the same and has the same gradients."""
    images, targets = scene(3)
    expected: dict[str, Tensor] = {}
    for form in FORMS:
        net = network(form, "training")
        predictions = step(net, "training", images, targets)
        gradients = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        values = {"pose_enc": predictions["pose_enc"], "depth": predictions["depth"], "gradients": gradients}
        expected = expected or values
        for name, value in values.items():
            assert_close(value.detach(), expected[name].detach(), 1e-4)


def growth(peaks: Iterable[float]) -> float:
    """MiB per view, between the fewest and the most views."""
    first, *_, last = peaks
    return (last - first) / (VIEWS[-1] - VIEWS[0])


def main() -> None:
    """Measure and record; prints one line per measurement for docs/models/vggt.md."""
    pin_threads(1)
    check()
    where = environment()
    print(f"| task | form | {' | '.join(f'{v} views' for v in VIEWS)} | per view |")
    for task in TASKS:
        peaks = {}
        for form in FORMS if task != "inference" else ("plain", "kept"):
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
                    command=f"`{COMMAND}`",
                ),
                where=where,
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak_mib(sys.argv[1], sys.argv[2], int(sys.argv[3])))
    else:
        main()
