"""Weights by name, so that a recorded case stores outputs only.

Both sides fill every parameter with numbers drawn from a stream that its name seeds; inputs are named in the
same way. A case is one `.npz`: `meta` (JSON: what was built, from which inputs) and digests of the outputs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PARITY_DIR = Path(__file__).parent / "parity"
TOLERANCE = 1e-4  # float32 relative error that every case must stay below, unless its README is stricter
_RUNNING_STATISTICS = ("running_mean", "running_var")


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard-normal float32 numbers of the legacy MT19937 stream, whose output is frozen for ever."""
    stream = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return stream.standard_normal(int(np.prod(shape, dtype=np.int64))).astype(np.float32).reshape(shape)


def _value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    z = _draw(name, shape)
    if len(shape) >= 2:
        return z / np.sqrt(np.prod(shape[1:]))
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        return 1 + 0.1 * np.abs(z)
    return 0.1 * z


@torch.no_grad()
def fill_(module: nn.Module, rename: Callable[[str], str] = lambda name: name) -> nn.Module:
    """Overwrite parameters and BatchNorm running statistics in place, each from its (renamed) state-dict name."""
    tensors = dict(module.named_parameters())
    tensors |= {n: b for n, b in module.named_buffers() if n.rsplit(".", 1)[-1] in _RUNNING_STATISTICS}
    for name, tensor in tensors.items():
        value = _value(rename(name), tuple(tensor.shape))
        tensor.copy_(torch.from_numpy(np.asarray(value, dtype=np.float32)).to(tensor.dtype))
    return module


def normal(seed: str, *shape: int) -> Tensor:
    """Standard-normal float32 tensor, named by `seed`."""
    return torch.from_numpy(_draw(f"input:{seed}", shape))


def image(seed: str, *shape: int) -> Tensor:
    """Smooth picture in [0, 1], [..., C, H, W]: upsampled low-frequency noise."""
    *lead, channels, height, width = shape
    coarse = normal(seed, int(np.prod(lead, dtype=np.int64)), channels, max(height // 16, 2), max(width // 16, 2))
    fine = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return torch.sigmoid(1.5 * fine).reshape(shape)


def imagenet_image(seed: str, *shape: int) -> Tensor:
    """`image`, normalised by the ImageNet mean and standard deviation."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (image(seed, *shape) - mean) / std


def digest(x: Tensor, n: int = 2048) -> np.ndarray:
    """At most `n` evenly strided entries of the flattened tensor, float32."""
    flat = x.detach().to(torch.float32).reshape(-1).cpu().numpy()
    return flat if flat.size <= n else flat[np.linspace(0, flat.size - 1, n).astype(np.int64)]


def load_case(family: str, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`meta` and the recorded digests of one case."""
    with np.load(PARITY_DIR / family / f"{name}.npz") as case:
        return json.loads(str(case["meta"])), {key: case[key] for key in case.files if key != "meta"}


def relative_error(got: Tensor, recorded: np.ndarray) -> float:
    """‖digest(got) − recorded‖ / ‖recorded‖ in float64; infinite for a wrong size or anything not finite."""
    ours, theirs = digest(got).astype(np.float64), recorded.astype(np.float64)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12))
