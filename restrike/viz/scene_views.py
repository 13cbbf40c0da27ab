"""Multi-view samples as still pictures: a row of panels a view, and all cameras as frusta."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from restrike.geometry import camera_centers, invert_se3, transform_points, unproject
from restrike.viz.scene import SceneViews, depth_agreement, seen_by_others, view_points

if TYPE_CHECKING:
    from PIL import Image

PANELS = ("image", "depth", "mask", "other views' points", "half of each")
_UNKNOWN, _PAPER, _INK = (128, 128, 128), (255, 255, 255), (30, 30, 30)
_GAP, _LINE = 6, 14
_DISTINCT = 0.1  # of singular values: horizontal axes that differ by this share tell a plane
_TILES = 6  # of the chequerboard, along the short side


def colorize_depth(depth: Tensor, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Depth [..., H, W] to uint8 [..., H, W, 3]: near is red, far is blue, unknown (0) is grey.

    Args:
        depth: scene units.
        low, high: ends of the colours; None takes the 2nd and 98th percentile.
    """
    from matplotlib import colormaps

    known = (depth > 0) & depth.isfinite()
    if low is None or high is None:
        low, high = depth_range(depth)
    share = ((depth.float() - low) / max(high - low, 1e-12)).clamp(0, 1).nan_to_num()
    colors = (255 * colormaps["turbo_r"](share.numpy())[..., :3]).round().astype(np.uint8)
    colors[~known.numpy()] = _UNKNOWN
    return colors


def depth_range(depth: Tensor) -> tuple[float, float]:
    """2nd and 98th percentile of the known depths; (0, 1) where none is known."""
    known = depth[(depth > 0) & depth.isfinite()].float()
    if not len(known):
        return 0.0, 1.0
    low, high = np.percentile(known.numpy(), (2, 98))
    return float(low), float(high)


def draw_views(scene: SceneViews, tile: int = 240) -> Image.Image:
    """A row of panels a view: image, depth, mask, the points of the other views as seen from here, and a chequerboard
    of that and the image, where lines run on from square to square if cameras and depth are right.

    Args:
        scene: to draw.
        tile: width of a panel, pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = scene.images.shape[-2:]
    tall = max(1, round(tile * height / width))
    sheet = Image.new(
        "RGB", (len(PANELS) * (tile + _GAP) + _GAP, 2 * _LINE + _GAP + len(scene) * (tall + _LINE + _GAP)), _PAPER
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    low, high = depth_range(scene.depth)
    draw.text((_GAP, 2), f"{scene.title}: depth {low:.3g} (red) to {high:.3g} (blue)", fill=_INK, font=font)
    for column, name in enumerate(PANELS):
        draw.text((_GAP + column * (tile + _GAP), _LINE + 2), name, fill=_INK, font=font)
    for view in range(len(scene)):
        top = 2 * _LINE + _GAP + view * (tall + _LINE + _GAP)
        panels, agreement = _panels(scene, view, low, high)
        for column, panel in enumerate(panels):
            nearest = panel.shape[1] < tile
            kind = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
            sheet.paste(Image.fromarray(panel).resize((tile, tall), kind), (_GAP + column * (tile + _GAP), top))
        told = "none in common" if math.isnan(agreement) else f"{100 * agreement:.2f} % from the best view's"
        draw.text((_GAP, top + tall), scene.labels[view], fill=_INK, font=font)
        draw.text((_GAP + 3 * (tile + _GAP), top + tall), f"depth: {told}", fill=_INK, font=font)
    return sheet


def _panels(scene: SceneViews, view: int, low: float, high: float) -> tuple[list[np.ndarray], float]:
    """uint8 [h, w, 3] each, and `depth_agreement`."""
    image = scene.images[view].permute(1, 2, 0).contiguous().numpy()
    depth = colorize_depth(scene.depth[view], low, high)
    known = scene.depth[view] > 0
    mask = known if scene.foreground is None else scene.foreground[view]
    shade = np.where(mask.numpy(), 255, 40).astype(np.uint8)
    shade = np.where(known.numpy(), shade, shade // 2 + 32)[..., None].repeat(3, axis=-1)
    seen = seen_by_others(scene, view)
    other = np.where((seen.depth > 0).numpy()[..., None], seen.colors.numpy(), np.uint8(_UNKNOWN[0]))
    side = max(1, min(image.shape[:2]) // _TILES)
    rows, columns = np.indices(image.shape[:2]) // side
    mixed = np.where(((rows + columns) % 2 == 0)[..., None], image, other)
    return [image, depth, shade, other, mixed], depth_agreement(scene, view)


def frustum(intrinsics: Tensor, world_to_camera: Tensor, size: tuple[int, int], length: float) -> Tensor:
    """Centre and image corners (upper left, upper right, lower right, lower left) in world axes.

    Args:
        intrinsics: [..., 3, 3], pixels.
        world_to_camera: [..., 3, 4].
        size: (H, W) of the image.
        length: z-depth of the corners, scene units.

    Returns:
        [..., 5, 3].
    """
    height, width = size
    corners = intrinsics.new_tensor([[0, 0], [width, 0], [width, height], [0, height]]).expand(
        *intrinsics.shape[:-2], 4, 2
    )
    depth = corners.new_full(corners.shape[:-1], length)
    camera_to_world = invert_se3(world_to_camera)
    return torch.cat([camera_to_world[..., None, :, 3], unproject(corners, depth, intrinsics, camera_to_world)], dim=-2)


def frustum_length(world_to_camera: Tensor, depth: Tensor) -> float:
    """A length at which frusta of cameras [V, 3, 4] with depth [V, ...] neither hide each other nor vanish."""
    centers = camera_centers(world_to_camera)
    spread = float((centers - centers.mean(0)).norm(dim=-1).max())
    known = depth[(depth > 0) & depth.isfinite()]
    return 0.15 * max(spread, float(known.median()) if len(known) else 0.0) or 1.0


def upright(world_to_camera: Tensor) -> Tensor:
    """Rotation [3, 3] of the world that turns up into +z, by cameras [V, 3, 4] that were held level.

    Up is what is perpendicular to all their horizontal axes; where these are parallel, it is the mean of their own up.
    """
    mean = torch.nn.functional.normalize(-world_to_camera[:, 1, :3].mean(0), dim=0)
    _, sizes, axes = torch.linalg.svd(world_to_camera[:, 0, :3], full_matrices=True)
    up = mean
    if len(sizes) > 1 and sizes[1] > _DISTINCT * sizes[0]:
        up = axes[2] * torch.sign(axes[2] @ mean)
        up = up if up @ mean > 0.5 else mean
    side = torch.linalg.cross(up.new_tensor([0.0, 1.0, 0.0]), up)
    if side.norm() < 1e-3:
        side = up.new_tensor([1.0, 0.0, 0.0])
    x = torch.nn.functional.normalize(side - (side @ up) * up, dim=0)
    return torch.stack([x, torch.linalg.cross(up, x), up])


def draw_cameras(scene: SceneViews, max_points: int = 6000) -> Image.Image:
    """All cameras as frusta around the coloured points, from the side and from above; mean up of the cameras is up."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure
    from PIL import Image

    turn = torch.cat([upright(scene.world_to_camera), torch.zeros(3, 1)], dim=1)
    clouds = [view_points(scene, view, max_points // len(scene)) for view in range(len(scene))]
    points = transform_points(turn, torch.cat([cloud.points for cloud in clouds])).numpy()
    colors = torch.cat([cloud.colors for cloud in clouds]).numpy() / 255
    length = frustum_length(scene.world_to_camera, scene.depth)
    size = (scene.images.shape[-2], scene.images.shape[-1])
    corners = transform_points(turn, frustum(scene.intrinsics, scene.world_to_camera, size, length)).numpy()
    low, high = _bounds(points, corners)
    inside = ((points >= low) & (points <= high)).all(-1)
    points, colors = points[inside], colors[inside]
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(scene.title)
    for place, (elevation, name) in enumerate(((20, "from the side"), (89, "from above")), start=1):
        axes = figure.add_subplot(1, 2, place, projection="3d")
        axes.scatter(*points.T, c=colors, s=1.5, linewidths=0, depthshade=False)
        for view, (center, *image) in enumerate(corners):
            color = colormaps["hsv"](view / len(scene))
            for a, b in [*((center, corner) for corner in image), *zip(image, [*image[1:], image[0]], strict=True)]:
                axes.plot(*zip(a, b, strict=True), color=color, linewidth=1.2)
            axes.text(*center, str(view), color=color)
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]), title=name)
        axes.set_box_aspect(high - low)
        axes.view_init(elev=elevation, azim=-60)
        if elevation > 80:
            axes.set_zticks([])
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _bounds(points: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A box with all cameras and the inner 80 % of the points."""
    inner = np.percentile(points, (10, 90), axis=0) if len(points) else np.zeros((0, 3))
    everything = np.concatenate([corners.reshape(-1, 3), inner])
    low, high = everything.min(0), everything.max(0)
    room = np.maximum(high - low, 1e-3 * (high - low).max() + 1e-9)
    return low - 0.02 * room, low + 1.02 * room
