"""A predicted scene, ready to leave: cameras of photos, and points that each come from a pixel of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from restrike.geometry import check_cameras, invert_se3, unproject


@dataclass(frozen=True)
class PhotoCameras:
    """Cameras of whole photos, in the conventions of `restrike.geometry.conventions`.

    Attributes:
        names: File names, with "/" for folders.
        sizes: int64 [V, 2], (H, W).
        intrinsics: [V, 3, 3], pixels.
        world_to_camera: [V, 3, 4].

    Raises:
        ValueError: no camera, or arrays that are none of cameras.
    """

    names: Sequence[str]
    sizes: Tensor
    intrinsics: Tensor
    world_to_camera: Tensor

    def __post_init__(self) -> None:
        if not self.names or not len(self.names) == len(self.sizes) == len(self.intrinsics) == len(
            self.world_to_camera
        ):
            raise ValueError(f"expected a size, intrinsics and a pose for each of {len(self.names)} photos, at least 1")
        check_cameras(self.world_to_camera, self.intrinsics, "predicted cameras")

    def __len__(self) -> int:
        return len(self.names)


class ScenePoints(NamedTuple):
    """Coloured points of all photos.

    Attributes:
        points: float32 [N, 3], world.
        colors: uint8 [N, 3].
        views: int64 [N], the photo that a point was seen in.
        pixels: float32 [N, 2], (x, y) in it.
        confidence: float32 [N], larger is surer; None where nobody knows.
    """

    points: Tensor
    colors: Tensor
    views: Tensor
    pixels: Tensor
    confidence: Tensor | None = None

    def select(self, rows: Tensor) -> ScenePoints:
        """Some of them, by index or mask [N]."""
        return ScenePoints(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


def lift_points(
    depth: Tensor,
    pixels: Tensor,
    colors: Tensor,
    camera: tuple[Tensor, Tensor],
    size: tuple[int, int],
    view: int = 0,
    confidence: Tensor | None = None,
    max_points: int | None = None,
) -> ScenePoints:
    """Points of one photo's depth map, in an order drawn from its row, so that any first part of them is a fair one.

    Args:
        depth: [P, Q], z-depth; not positive or not finite where unknown.
        pixels: [P, Q, 2], where its cells lie in the photo; those outside are left out.
        colors: uint8 [3, P, Q].
        camera: The photo's intrinsics [3, 3] and world_to_camera [3, 4].
        size: Of the photo, (H, W).
        view: The photo's row.
        confidence: [P, Q].
        max_points: Keep so many at most.
    """
    intrinsics, world_to_camera = camera
    points = unproject(pixels, depth.float(), intrinsics, invert_se3(world_to_camera))
    inside = ((pixels >= 0) & (pixels < pixels.new_tensor([size[1], size[0]]))).all(-1)
    rows = (inside & (depth > 0) & points.isfinite().all(-1)).flatten().nonzero()[:, 0]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(view))
    rows = rows[order[:max_points]]
    return ScenePoints(
        points.reshape(-1, 3)[rows].float(),
        colors.flatten(1).T[rows],
        torch.full((len(rows),), view),
        pixels.reshape(-1, 2)[rows].float(),
        None if confidence is None else confidence.flatten()[rows].float(),
    )


def join_points(parts: Sequence[ScenePoints]) -> ScenePoints:
    """Points of several photos; confidence only if all have it."""
    confidences = [part.confidence for part in parts if part.confidence is not None]
    return ScenePoints(
        torch.cat([part.points for part in parts]),
        torch.cat([part.colors for part in parts]),
        torch.cat([part.views for part in parts]),
        torch.cat([part.pixels for part in parts]),
        torch.cat(confidences) if len(confidences) == len(parts) else None,
    )


def surest_points(points: ScenePoints, share: float) -> ScenePoints:
    """Without the least confident `share` of them; all of them where there is no confidence."""
    if points.confidence is None or share <= 0 or not len(points.points):
        return points
    keep = round((1 - share) * len(points.points))
    return points.select(points.confidence.argsort(descending=True, stable=True)[:keep].sort().values)
