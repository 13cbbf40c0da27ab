"""Inputs that several recorded cases of CUT3R are built from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multiview_cases import cut3r_poses
from parity_tools import image, normal
from restrike.losses.recurrent import RecurrentTargets, recurrent_targets
from restrike.models.cut3r import Predictions


def log_length(x: Tensor) -> Tensor:
    length = x.norm(dim=-1, keepdim=True)
    return x / length.clamp(min=1e-12) * length.log1p()


def recorded_predictions(meta: dict[str, Any]) -> Predictions:
    tag, v, b, h, w = (meta[key] for key in ("tag", "V", "B", "H", "W"))
    back = torch.tensor([0, 0, 2.5])

    def draw(name: str, *shape: int) -> Tensor:
        return torch.stack([normal(f"{tag}/pr{i}/{name}", b, *shape) for i in range(v)], dim=1)

    quaternion = draw("q", 4)
    quaternion = quaternion / quaternion.norm(dim=-1, keepdim=True) * quaternion[..., :1].sign()
    values = Predictions(
        points_camera=0.8 * draw("self", h, w, 3) + back,
        confidence_camera=1 + draw("cs", h, w).exp(),
        points_world=0.8 * draw("other", h, w, 3) + back,
        confidence_world=1 + draw("c", h, w).exp(),
        colors=draw("rgb", h, w, 3).tanh(),
        poses=torch.cat([0.5 * draw("t", 3), quaternion], dim=-1),
    )
    return Predictions(*(x.requires_grad_() for x in values))


def recorded_targets(meta: dict[str, Any], anchor_view: int | None = None) -> RecurrentTargets:
    tag, v, b, h, w = (meta[key] for key in ("tag", "V", "B", "H", "W"))

    def stack(values: list[Tensor]) -> Tensor:
        return torch.stack(values, dim=1)

    noise = stack([normal(f"{tag}/gt{i}/m", b, h, w) for i in range(v)])
    poses = stack([cut3r_poses(f"{tag}/gt{i}", b) for i in range(v)])
    flags = {name: torch.tensor(value) for name, value in meta["flags"].items()}
    return recurrent_targets(
        stack([normal(f"{tag}/gt{i}/pts", b, h, w, 3) for i in range(v)]) + torch.tensor([0, 0, 3.0]),
        poses,
        valid=noise > -0.8,
        sky=noise < -1.6,
        images=stack([2 * image(f"{tag}/gt{i}/img", b, 3, h, w) - 1 for i in range(v)]),
        anchor=None if anchor_view is None else poses[:, anchor_view],
        is_metric=flags["metric"],
        is_camera_only=flags.get("cam_only"),
        is_single_view=flags.get("single"),
        is_depth_only=flags.get("depth_only"),
        image_mask=flags["img_mask"].mT if "img_mask" in flags else None,
    )
