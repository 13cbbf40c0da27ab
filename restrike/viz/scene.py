"""Views of one scene, their points, and what one view looks like by the points of the others.

If a convention of the cameras, of the pixels or of depth is wrong, `seen_by_others` is not the view's own picture, and
`depth_agreement` is far from zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from restrike.geometry import invert_se3, project_points, resize_intrinsics, unproject_depth

_COMMON = 30  # points that two views have to share before they can be said to agree


@dataclass(frozen=True)
class SceneViews:
    """V views in the conventions of `restrike.geometry.conventions`.

    Attributes:
        title: of the scene.
        labels: one a view.
        images: uint8 [V, 3, H, W].
        depth: float [V, P, Q], z-depth, 0 where unknown; its grid covers the image and may be coarser.
        intrinsics: [V, 3, 3], pixels of `images`.
        world_to_camera: [V, 3, 4].
        foreground: bool [V, P, Q], or None.
        confidence: float [V, P, Q] of predicted depth, larger is surer, or None.

    Raises:
        ValueError: arrays that do not belong together.
    """

    title: str
    labels: list[str]
    images: Tensor
    depth: Tensor
    intrinsics: Tensor
    world_to_camera: Tensor
    foreground: Tensor | None = None
    confidence: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.dtype != torch.uint8:
            raise ValueError(f"images: expected uint8 [V, 3, H, W], got {self.images.dtype} {list(self.images.shape)}")
        views, grid = len(self.images), tuple(self.depth.shape[1:])
        expected: dict[str, tuple[int, ...]] = {"intrinsics": (views, 3, 3), "world_to_camera": (views, 3, 4)}
        expected |= dict.fromkeys(("depth", "foreground", "confidence"), (views, *grid))
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name}: expected {list(shape)} for {views} views, got {list(value.shape)}")
        if len(self.labels) != views:
            raise ValueError(f"labels: expected {views}, got {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.images)


class ColoredPoints(NamedTuple):
    """points float32 [N, 3] in world axes; colors uint8 [N, 3]; confidence float32 [N] or None."""

    points: Tensor
    colors: Tensor
    confidence: Tensor | None = None


class Rendering(NamedTuple):
    """colors uint8 [H, W, 3] and depth float32 [H, W]; both 0 where no point falls."""

    colors: Tensor
    depth: Tensor


def view_points(scene: SceneViews, view: int, max_points: int | None = None) -> ColoredPoints:
    """The points of one view's depth map, evenly thinned to `max_points`."""
    height, width = scene.images.shape[-2:]
    rows, columns = scene.depth.shape[-2:]
    depth = scene.depth[view].float()
    intrinsics = resize_intrinsics(scene.intrinsics[view].float(), columns / width, rows / height)
    points = unproject_depth(depth, intrinsics, invert_se3(scene.world_to_camera[view].float()))
    colors = scene.images[view]
    if (rows, columns) != (height, width):
        colors = F.interpolate(colors[None].float(), (rows, columns), mode="area")[0].round().to(torch.uint8)
    known = (depth > 0) & depth.isfinite() & points.isfinite().all(-1)
    keep = known.flatten().nonzero()[:, 0]
    if max_points is not None and len(keep) > max_points:
        keep = keep[torch.linspace(0, len(keep) - 1, max_points).round().long()]
    confidence = None if scene.confidence is None else scene.confidence[view].float().flatten()[keep]
    return ColoredPoints(points.reshape(-1, 3)[keep], colors.flatten(1).T[keep], confidence)


def render_points(
    cloud: ColoredPoints, intrinsics: Tensor, world_to_camera: Tensor, size: tuple[int, int], radius: int = 1
) -> Rendering:
    """Draw points as squares of 2 * radius + 1 pixels, the nearest on top.

    Args:
        cloud: in world axes.
        intrinsics: [3, 3], pixels.
        world_to_camera: [3, 4].
        size: (H, W).
        radius: of a square, pixels.
    """
    height, width = size
    coords, depth = project_points(cloud.points, intrinsics.float(), world_to_camera.float())
    front = (depth > 0).nonzero()[:, 0]
    column, row = coords[front].floor().clamp(-1e6, 1e6).long().unbind(-1)
    colors, nearest = torch.zeros(height * width, 3, dtype=torch.uint8), torch.full((height * width,), torch.inf)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            inside = (row + dy >= 0) & (row + dy < height) & (column + dx >= 0) & (column + dx < width)
            place = (row + dy)[inside] * width + (column + dx)[inside]
            which = front[inside]
            closest = nearest.scatter_reduce(0, place, depth[which], "amin")
            wins = depth[which] <= closest[place]
            colors[place[wins]] = cloud.colors[which[wins]]
            nearest = closest
    nearest[nearest.isinf()] = 0
    return Rendering(colors.view(height, width, 3), nearest.view(height, width))


def seen_by_others(scene: SceneViews, view: int) -> Rendering:
    """What the points of all other views give from this view's camera, at the image's size."""
    clouds = [view_points(scene, other) for other in range(len(scene)) if other != view]
    cloud = ColoredPoints(
        torch.cat([torch.zeros(0, 3), *(c.points for c in clouds)]),
        torch.cat([torch.zeros(0, 3, dtype=torch.uint8), *(c.colors for c in clouds)]),
    )
    height, width = scene.images.shape[-2:]
    radius = max(1, round(0.5 * width / scene.depth.shape[-1]))
    return render_points(cloud, scene.intrinsics[view], scene.world_to_camera[view], (height, width), min(radius, 8))


def depth_agreement(scene: SceneViews, view: int, max_points: int = 4000) -> float:
    """How well this view's depth agrees with the view that agrees best: the median of |depth of that view's points, as
    seen from here, - own depth| / own depth. NaN where no other view has `_COMMON` points with a known depth here.

    The best and not the mean: points that are hidden from here, of a view from behind say, differ with good reason.
    """
    rows, columns = scene.depth.shape[-2:]
    height, width = scene.images.shape[-2:]
    own, best = scene.depth[view].float(), float("nan")
    for other in range(len(scene)):
        if other == view:
            continue
        points = view_points(scene, other, max_points).points
        coords, depth = project_points(points, scene.intrinsics[view].float(), scene.world_to_camera[view].float())
        cells = (coords * coords.new_tensor([columns / width, rows / height])).floor()
        inside = (depth > 0) & (cells >= 0).all(-1) & (cells[:, 0] < columns) & (cells[:, 1] < rows)
        column, row = cells[inside].long().unbind(-1)
        there, seen = own[row, column], depth[inside]
        differences = ((seen - there).abs() / there)[there > 0]
        if len(differences) >= _COMMON and not best <= float(differences.median()):
            best = float(differences.median())
    return best
