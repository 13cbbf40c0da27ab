"""From raw head outputs to lengths, angles and confidences (arXiv 2503.11651, section 3.3 and its release)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["exp", "inv_log", "norm", "norm_exp", "relu", "sigmoid", "linear", "xy_inv_log"]
ConfidenceActivation = Literal["expp1", "expp0", "sigmoid"]
PoseActivation = Literal["linear", "inv_log", "exp", "relu"]


def inv_log(x: Tensor) -> Tensor:
    """sign(x) · (e^|x| - 1): far and near values from small numbers of either sign."""
    return x.sign() * x.abs().expm1()


def activate(x: Tensor, kind: Activation) -> Tensor:
    """Values [..., C] of a dense head; "norm", "norm_exp" and "xy_inv_log" take the last dimension as a vector."""
    if kind in ("norm", "norm_exp"):
        length = x.norm(dim=-1, keepdim=True)
        direction = x / length.clamp(min=1e-8)
        return direction * (length.expm1() if kind == "norm_exp" else 1.0)
    if kind == "xy_inv_log":
        z = inv_log(x[..., 2:])
        return torch.cat([x[..., :2] * z, z], dim=-1)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "exp": torch.exp,
        "inv_log": inv_log,
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
        "linear": lambda y: y,
    }
    return functions[kind](x)


def activate_confidence(x: Tensor, kind: ConfidenceActivation = "expp1") -> Tensor:
    """Confidence from its logit: 1 + e^x, e^x, or a sigmoid."""
    if kind == "sigmoid":
        return x.sigmoid()
    return x.exp() + (1.0 if kind == "expp1" else 0.0)


def activate_pose(
    encoding: Tensor,
    translation: PoseActivation = "linear",
    quaternion: PoseActivation = "linear",
    fov: PoseActivation = "relu",
) -> Tensor:
    """Each part of a pose encoding [..., 9] (see `restrike.geometry.encode_pose_fov`) through its function."""
    parts = zip(encoding.split([3, 4, 2], dim=-1), (translation, quaternion, fov), strict=True)
    return torch.cat([activate(part, kind) for part, kind in parts], dim=-1)


def check_activation(name: str, kind: str, choices: object) -> None:
    """Raise unless `kind` is one of the literal type's values.

    Raises:
        ValueError: names the argument, the choices and what came.
    """
    if kind not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {kind!r}")
