"""VGGT's loss of cameras, over all rounds of its camera head (arXiv 2503.11651, section 3.4).

The paper says Huber; its release took l1, as "more stable".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from restrike.geometry import full_precision
from restrike.losses.robust import finite_clamp

CameraDistance = Literal["l1", "l2", "huber"]
_MIN_VALID = 100  # a scene counts if its first view has more valid pixels
_FOV_WEIGHT = 0.5


class CameraLoss(NamedTuple):
    """Scalars: translation, rotation and field of view, each averaged over rounds."""

    translation: Tensor
    rotation: Tensor
    fov: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, the field of view with weight 1/2."""
        return self.translation + self.rotation + _FOV_WEIGHT * self.fov


def camera_loss(
    encodings: Sequence[Tensor],
    target: Tensor,
    valid: Tensor,
    distance: CameraDistance = "l1",
    decay: float = 0.6,
    huber_delta: float = 0.1,
) -> CameraLoss:
    """Distance of pose encodings, in float32.

    Args:
        encodings: [B, V, 9] of each round, the last one the result; see `restrike.geometry.encode_pose_fov`.
        target: [B, V, 9].
        valid: [B, V, H, W] bool, pixels with depth: a scene counts, with all its views, if its first view has more
            than 100 of them.
        distance: "l1" and "huber" average over components, "l2" is the mean length.
        decay: Round i of n has weight decay^(n - 1 - i) / n.
        huber_delta: Where "huber" becomes linear.

    Returns:
        CameraLoss; zeros (with a graph) where no scene counts.
    """
    if distance not in get_args(CameraDistance):
        raise ValueError(f"distance: expected one of {get_args(CameraDistance)}, got {distance!r}")
    counts = valid[:, 0].flatten(1).sum(-1) > _MIN_VALID
    n = len(encodings)
    total = target.new_zeros(3, dtype=torch.float32)
    for i, encoding in enumerate(encodings):
        total = total + decay ** (n - 1 - i) / n * _parts(encoding, target, counts, distance, huber_delta)
    return CameraLoss(*total.unbind())


@full_precision
def _parts(encoding: Tensor, target: Tensor, counts: Tensor, distance: str, huber_delta: float) -> Tensor:
    """Translation, rotation, field of view; [3]."""
    difference = torch.where(counts[:, None, None], encoding - target, 0.0)
    views = counts.sum().clamp(min=1) * encoding.shape[1]
    parts = []
    for part in difference.split([3, 4, 2], dim=-1):
        if distance == "l2":
            each = part.norm(dim=-1)
        elif distance == "l1":
            each = finite_clamp(part.abs()).mean(-1)
        else:
            clamped = finite_clamp(part)
            each = F.huber_loss(clamped, torch.zeros_like(clamped), reduction="none", delta=huber_delta).mean(-1)
        parts.append(each.sum() / views)
    return torch.stack(parts)
