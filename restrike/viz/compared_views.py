"""What a network says of the views of a scene, beside the truth: depth, points and cameras on one sheet."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from restrike.geometry import (
    align_cameras,
    invert_se3,
    multiply,
    rotation_angle,
    to_first_camera,
    transform_points,
    unproject_depth,
)
from restrike.viz.scene import SceneViews, view_points
from restrike.viz.scene_views import colorize_depth, depth_range, frustum, frustum_length, upright

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

ROWS = ("image", "true depth", "predicted", "true points", "predicted")
_UNKNOWN, _PAPER, _INK = 128, (255, 255, 255), (30, 30, 30)
_TRUE, _PREDICTED = (20, 110, 90), (214, 69, 65)
_GAP, _LINE, _LABEL = 4, 14, 76
_SMOOTH = 3  # the plot is drawn so much larger, and made smaller
_CLOUD = 3000  # points of the scene in the plot


def compare_views(
    true: SceneViews, predicted: SceneViews, points: Tensor | None = None, tile: int = 112
) -> Image.Image:
    """One column a view, with image, true and predicted depth, true and predicted points; beside it all cameras.

    Predictions know no unit: depths and points are scaled to the truth's median, cameras by `align_cameras`. Depth goes
    from red to blue with the true range, points have the truth's x, y, z as red, green, blue.

    Args:
        true: depth 0 where unknown.
        predicted: the same views, with depth on the same grid.
        points: predicted [V, P, Q, 3] in the first camera; None lifts the predicted depth by the predicted cameras.
        tile: width of a panel, pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    tall = max(1, round(tile * true.images.shape[-2] / true.images.shape[-1]))
    panels, error = _panels(true, predicted, points)
    top, table = _LINE + _GAP + _LINE, _LABEL + len(true) * (tile + _GAP)
    side = max(len(ROWS) * (tall + _GAP) - _GAP, 3 * tile)
    sheet = Image.new("RGB", (table + 2 * _GAP + side, top + side + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row, (name, pictures) in enumerate(zip(ROWS, panels, strict=True)):
        y = top + row * (tall + _GAP)
        draw.text((_GAP, y + tall // 2 - _LINE // 2), name, fill=_INK, font=font)
        for view, picture in enumerate(pictures):
            kind = Image.Resampling.NEAREST if picture.shape[1] < tile else Image.Resampling.BILINEAR
            sheet.paste(Image.fromarray(picture).resize((tile, tall), kind), (_LABEL + view * (tile + _GAP), y))
    for view, label in enumerate(true.labels):
        draw.text((_LABEL + view * (tile + _GAP), top - _LINE), label, fill=_INK, font=font)
    plot, turn = _cameras(true, predicted, side)
    sheet.paste(plot, (table + _GAP, top))
    draw.text((_GAP, 2), f"{true.title}: depth off by {error}, orientations by {turn}", fill=_INK, font=font)
    draw.text((table + _GAP, top - _LINE), "cameras from above:", fill=_INK, font=font)
    draw.text((table + _GAP + 116, top - _LINE), "true", fill=_TRUE, font=font)
    draw.text((table + _GAP + 146, top - _LINE), "predicted", fill=_PREDICTED, font=font)
    return sheet


def _panels(true: SceneViews, predicted: SceneViews, points: Tensor | None) -> tuple[list[list[np.ndarray]], str]:
    """uint8 [h, w, 3] a view, for each of `ROWS`; and the mean relative error of depth."""
    known = (true.depth > 0) & true.depth.isfinite()
    depth = _scaled(predicted.depth, true.depth, known)
    low, high = depth_range(true.depth)
    relative = ((depth - true.depth).abs() / true.depth)[known & depth.isfinite()]
    error = f"{100 * float(relative.mean()):.1f} %" if len(relative) else "? (no true depth)"
    true_points = _first_camera_points(true)
    if points is None:
        points = _first_camera_points(predicted)
    factor = _scaled(points.norm(dim=-1), true_points.norm(dim=-1), known) / points.norm(dim=-1).clamp(min=1e-12)
    ends = _range(true_points[known])
    everywhere = torch.ones_like(known)
    return [
        [image.permute(1, 2, 0).contiguous().numpy() for image in true.images],
        list(colorize_depth(true.depth, low, high)),
        list(colorize_depth(depth, low, high)),
        list(_colors(true_points, known, ends)),
        list(_colors(points * factor[..., None], everywhere, ends)),
    ], error


def _scaled(predicted: Tensor, true: Tensor, known: Tensor) -> Tensor:
    """In the truth's unit, by the ratio of medians; as it is where there is none."""
    known = known & predicted.isfinite()
    if not bool(known.any()):
        return predicted
    ratio = float(true[known].median() / predicted[known].median())
    return predicted * ratio if ratio > 0 and math.isfinite(ratio) else predicted


def _first_camera_points(scene: SceneViews) -> Tensor:
    """Points [V, P, Q, 3] of depth, in the first camera; the grid covers the image."""
    return unproject_depth(scene.depth, scene.intrinsics, invert_se3(to_first_camera(scene.world_to_camera)))


def _range(points: Tensor) -> tuple[Tensor, Tensor]:
    """2nd and 98th percentile [3] of points [N, 3] along each axis."""
    if not len(points):
        return torch.zeros(3), torch.ones(3)
    low, high = (torch.from_numpy(x).float() for x in np.percentile(points.numpy(), (2, 98), axis=0))
    return low, high


def _colors(points: Tensor, known: Tensor, ends: tuple[Tensor, Tensor]) -> np.ndarray:
    low, high = ends
    share = ((points - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colors = (255 * share.nan_to_num()).round().to(torch.uint8)
    return torch.where(known[..., None] & points.isfinite().all(-1, keepdim=True), colors, _UNKNOWN).numpy()


def _cameras(true: SceneViews, predicted: SceneViews, side: int) -> tuple[Image.Image, str]:
    """The plot from above, and the mean angle between true and predicted orientations."""
    from PIL import Image, ImageDraw

    true_poses, poses = invert_se3(true.world_to_camera), invert_se3(predicted.world_to_camera)
    found = poses.isfinite().all(-1).all(-1)
    turn = torch.cat([upright(true.world_to_camera), torch.zeros(3, 1)], dim=1)
    length, size = frustum_length(true.world_to_camera, true.depth), (true.images.shape[-2], true.images.shape[-1])
    sets = {_TRUE: _triangles(true.intrinsics, true.world_to_camera, size, length, turn)}
    told = "? (no camera found)"
    if bool(found.any()):
        aligned = align_cameras(poses[found], true_poses[found]).apply_to_cameras(poses[found])
        angle = rotation_angle(multiply(aligned[..., :3].mT, true_poses[found][..., :3])).mean()
        told = f"{math.degrees(float(angle)):.1f} degrees"
        intrinsics = predicted.intrinsics[found]
        has_focal = intrinsics.isfinite().all(-1).all(-1) & (intrinsics[:, 0, 0] > 0) & (intrinsics[:, 1, 1] > 0)
        intrinsics = torch.where(has_focal[:, None, None], intrinsics, true.intrinsics[found])
        sets[_PREDICTED] = _triangles(intrinsics, invert_se3(aligned), size, length, turn)
    clouds = [view_points(true, view, max(1, _CLOUD // len(true))) for view in range(len(true))]
    ground = transform_points(turn, torch.cat([cloud.points for cloud in clouds]))[:, :2].numpy()
    colors = torch.cat([cloud.colors for cloud in clouds]).numpy()
    to_pixels = _view_of(np.concatenate([x.reshape(-1, 2) for x in sets.values()]), ground, side * _SMOOTH)
    picture = Image.new("RGB", (side * _SMOOTH,) * 2, (247, 247, 247))
    draw = ImageDraw.Draw(picture)
    for (x, y), color in zip(to_pixels(ground), colors, strict=True):
        pale = tuple(int(c) for c in color.astype(int) // 2 + 120)
        draw.rectangle((x - _SMOOTH, y - _SMOOTH, x + _SMOOTH, y + _SMOOTH), fill=pale)
    if _PREDICTED in sets:
        for a, b in zip(to_pixels(sets[_TRUE][found.numpy(), 0]), to_pixels(sets[_PREDICTED][:, 0]), strict=True):
            draw.line([tuple(a), tuple(b)], fill=(190, 190, 190), width=_SMOOTH)
    numbers = {_TRUE: range(len(true)), _PREDICTED: found.nonzero()[:, 0].tolist()}
    for color, triangles in sets.items():
        for number, triangle in zip(numbers[color], triangles, strict=True):
            _draw_camera(draw, to_pixels(triangle), color, str(number))
    return picture.resize((side, side), Image.Resampling.LANCZOS), told


def _triangles(
    intrinsics: Tensor, world_to_camera: Tensor, size: tuple[int, int], length: float, turn: Tensor
) -> np.ndarray:
    """Centre, left and right end of each frustum [V, 3, 2], from above."""
    corners = transform_points(turn, frustum(intrinsics, world_to_camera, size, length))
    center, *image = corners.unbind(1)
    return torch.stack([center, (image[0] + image[3]) / 2, (image[1] + image[2]) / 2], dim=1)[..., :2].numpy()


def _view_of(cameras: np.ndarray, ground: np.ndarray, side: int) -> Callable[[np.ndarray], np.ndarray]:
    """From plane to pixels of a square that holds all cameras [N, 2] and the inner half of the points; y is up."""
    inner = np.percentile(ground, (25, 75), axis=0) if len(ground) else np.zeros((0, 2))
    everything = np.concatenate([cameras, inner])
    low, high = everything.min(0), everything.max(0)
    scale = 0.9 * side / max(float((high - low).max()), 1e-9)
    middle = (low + high) / 2
    return lambda points: np.clip((points - middle) * (scale, -scale) + side / 2, -side, 2 * side)


def _draw_camera(draw: ImageDraw.ImageDraw, corners: np.ndarray, color: tuple[int, int, int], name: str) -> None:
    from PIL import ImageFont

    center, left, right = (tuple(corner) for corner in corners)
    for line in ([center, left], [center, right], [left, right]):
        draw.line(line, fill=color, width=2 * _SMOOTH)
    away = corners[0] - corners[1:].mean(0)
    x, y = corners[0] + 9 * _SMOOTH * away / max(float(np.linalg.norm(away)), 1e-9)
    draw.text((x, y), name, fill=color, font=ImageFont.load_default(11 * _SMOOTH), anchor="mm")
