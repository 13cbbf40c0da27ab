"""From raw head outputs to points, confidences, colours and poses (arXiv 2501.12387, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

_MIN_LENGTH = 1e-8
_COLOR_MARGIN = 1e-6  # keeps colours inside (-1, 1)


def exp_length(x: Tensor) -> Tensor:
    """Vectors [..., 3] along themselves, with length d turned into e^d - 1."""
    length = x.norm(dim=-1, keepdim=True)
    return x / length.clamp(min=_MIN_LENGTH) * length.expm1()


def activate_points(raw: Tensor, faces_forward: bool = False) -> tuple[Tensor, Tensor]:
    """Points [..., H, W, 3] and confidences [..., H, W] ≥ 1 of raw maps [..., 4, H, W].

    Args:
        faces_forward: Turn whole vectors round where z < 0 (z = 0 gives the zero vector), as the linear head does for
            points in the view's own camera.
    """
    values = raw.movedim(-3, -1)
    points, confidence = values[..., :3], 1 + values[..., 3].exp()
    if faces_forward:
        points = points * points[..., 2:].sign()
    return exp_length(points), confidence


def activate_colors(raw: Tensor) -> Tensor:
    """Colours [..., H, W, 3] in (-1, 1) of raw maps [..., 3, H, W]."""
    return (raw.movedim(-3, -1).sigmoid() * (1 - 2 * _COLOR_MARGIN) + _COLOR_MARGIN) * 2 - 1


def activate_pose(raw: Tensor) -> Tensor:
    """Pose [..., 7] (translation; unit quaternion w, x, y, z with w ≥ 0) of seven raw numbers."""
    return torch.cat([exp_length(raw[..., :3]), _standard_quaternion(raw[..., 3:])], dim=-1)


def released_deactivate_pose(pose: Tensor) -> Tensor:
    """What the release calls the inverse of `activate_pose`, for comparisons: it is not one.

    It divides by the slope, t |t| / (e^|t| - 1), where the inverse would take log(1 + |t|); both agree near 0 only.
    """
    translation = pose[..., :3]
    length = translation.norm(dim=-1, keepdim=True)
    return torch.cat([translation * length / length.expm1().clamp(min=_MIN_LENGTH), pose[..., 3:]], dim=-1)


def _standard_quaternion(raw: Tensor) -> Tensor:
    unit = raw / raw.norm(dim=-1, keepdim=True).clamp(min=_MIN_LENGTH)
    return torch.where(unit[..., :1] < 0, -unit, unit)
