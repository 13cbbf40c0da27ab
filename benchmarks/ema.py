"""One EMA update of FasterViT-0 (31.4 M parameters): ours against timm's two and Lightning's, and its share of a step.

    python -m benchmarks ema [--device cuda]

All start from the same weights and follow the same change; equal averages first, then the processor time of an update.
Lightning's callback updates a `torch.optim.swa_utils.AveragedModel`, whose first update copies the weights: it is
compared after that.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from benchmarks.harness import Row, assert_close, clock_of, compare, environment, pin_threads, record
from restrike.models import build
from restrike.optim import WeightAverage
from restrike.optim.weight_average import averaged_names

COMMAND = "python -m benchmarks ema"
DECAY = 0.9998
BATCH = 8
TOLERANCE = 1e-5  # Lightning moves a tensor with two names once an update, all others twice


def flat(module: nn.Module, names: list[str]) -> Tensor:
    """The floating tensors of those names."""
    state = module.state_dict()
    return torch.cat([state[name].flatten() for name in names if state[name].is_floating_point()])


def follow(net: nn.Module) -> tuple[WeightAverage, dict[str, tuple[nn.Module, Callable[[], None]]]]:
    """Our average of `net`, and the peers': name → (the averaged module, its update)."""
    ours = WeightAverage(net, DECAY)
    v2 = ModelEmaV2(net, decay=DECAY)
    v3 = ModelEmaV3(net, decay=DECAY, foreach=True)
    # As EMAWeightAveraging of Lightning builds it.
    lightning = AveragedModel(net, use_buffers=True, avg_fn=get_ema_avg_fn(DECAY))
    lightning.update_parameters(net)
    peers: dict[str, tuple[nn.Module, Callable[[], None]]] = {
        "timm ModelEmaV2": (v2.module, lambda: v2.update(net)),
        "timm ModelEmaV3": (v3.module, lambda: v3.update(net)),
        "Lightning EMAWeightAveraging": (lightning.module, lambda: lightning.update_parameters(net)),
    }
    return ours, peers


@torch.no_grad()
def move(net: nn.Module) -> None:
    """A change as a step makes it, of parameters and of BatchNorm statistics."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point() and not any(stride == 0 for stride in tensor.stride()):
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.device), alpha=0.01)


def training_step(net: nn.Module) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW on `BATCH` images of 224 px."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    device = next(net.parameters()).device
    images, targets = torch.randn(BATCH, 3, 224, 224, device=device), torch.arange(BATCH, device=device)

    def step() -> None:
        F.cross_entropy(net(images), targets).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(device: str) -> list[Row]:
    """A row for each peer, and one for the share of a step."""
    torch.manual_seed(0)
    net = build("faster_vit_0_224").to(device)
    ours, peers = follow(net)
    names = averaged_names(net)
    move(net)
    ours.update()
    command = COMMAND + (f" --device {device}" if device != "cpu" else "")
    title = "EMA update, FasterViT-0" + (f" on {device}" if device != "cpu" else "")
    rows, errors = [], {}
    for name, (module, update) in peers.items():
        update()
        errors[name] = assert_close(flat(ours.module, names), flat(module, names), TOLERANCE)
    for name, (_, update) in peers.items():
        timing = compare(ours.update, update, rounds=11, clock=clock_of(device))
        checked = f"averages within {errors[name]:.0e} after a step"
        rows.append(Row.of(timing, name=f"{title}, against {name}", peer_name=name, checked=checked, command=command))
    share = compare(ours.update, training_step(copy.deepcopy(net)), rounds=7, warmup=1, clock=clock_of(device))
    low, high = (100 / ratio for ratio in reversed(share.quartiles))
    return [
        *rows,
        Row(
            name=f"{title}, share of a training step of {BATCH} images",
            ours=f"{100 / share.ratio:.2f} %, {1e3 * statistics.median(share.ours_s):.3g} ms",
            spread=f"{low:.2f}–{high:.2f} %",
            peer=f"{1e3 * statistics.median(share.peer_s):,.0f} ms (the step)",
            command=f"`{command}`",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pin_threads(1)
    record(*measure(args.device), where=environment("timm", "lightning"))


if __name__ == "__main__":
    main()
