"""One self-contained HTML page with a rotatable 3-D view of scenes: points, cameras, and each view's photo, depth and
confidence.

It asks the network for nothing, and its content security policy forbids it to. Its size is bounded: points by who makes
the layers, pictures of all views together by `_PICTURE_PIXELS`.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from restrike.geometry import camera_centers, split_intrinsics
from restrike.viz.scene import ColoredPoints, SceneViews, view_points
from restrike.viz.scene_views import depth_range, frustum, frustum_length, upright

_PICTURE_SIDE = 384  # pixels, long side at most
_PICTURE_PIXELS = 3_000_000  # of all views' pictures together, at 4:3
_LEVELS = 256  # of the confidence slider
_LOG_SPAN = 6.0  # farthest over nearest from which on depth is coloured by its logarithm


@dataclass(frozen=True)
class PageCamera:
    """A camera of OpenCV axes: intrinsics [3, 3] in pixels of an image of `size` (H, W), world_to_camera [3, 4]."""

    intrinsics: Tensor
    world_to_camera: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class PageLayer:
    """What one toggle shows.

    Attributes:
        name: beside the toggle.
        points: in world axes; confidence, where given, feeds the slider.
        camera: drawn as a frustum.
        image: uint8 [3, H, W], shown beside the toggle and on the frustum.
        color: of the frustum, 0 to 255.
        depth: [P, Q], z-depth over the image, 0 where unknown.
        confidence: [P, Q] of the depth, larger is surer.
    """

    name: str
    points: ColoredPoints
    camera: PageCamera | None = None
    image: Tensor | None = None
    color: tuple[int, int, int] = (120, 200, 255)
    depth: Tensor | None = None
    confidence: Tensor | None = None


@dataclass(frozen=True)
class PageScene:
    """A scene to choose: its title, its layers, and what its lengths are measured in. Views of a data set, predictions,
    or both beside each other."""

    title: str
    layers: Sequence[PageLayer] = field(default_factory=list)
    unit: str = "units"


def page_scene(scene: SceneViews, max_points: int = 120_000) -> PageScene:
    """A layer for each view of a scene, with at most `max_points` points in all."""
    size = (scene.images.shape[-2], scene.images.shape[-1])
    layers = [
        PageLayer(
            scene.labels[view],
            view_points(scene, view, max(1, max_points // len(scene))),
            PageCamera(scene.intrinsics[view], scene.world_to_camera[view], size),
            scene.images[view],
            view_color(view, len(scene)),
            scene.depth[view],
            None if scene.confidence is None else scene.confidence[view],
        )
        for view in range(len(scene))
    ]
    return PageScene(scene.title, layers)


def view_color(view: int, views: int) -> tuple[int, int, int]:
    """Of a view's frustum: hues in a circle."""
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb(view / views, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def picture_side(views: int) -> int:
    """Pixels of the long side of a view's picture and maps, such that those of so many views stay small."""
    return max(32, min(_PICTURE_SIDE, int((_PICTURE_PIXELS * 4 / 3 / views) ** 0.5)))


def shrink_map(values: Tensor, side: int) -> Tensor:
    """A map [P, Q] with a long side of `side` cells at most; cells are taken, not mixed: half of two depths is none."""
    factor = side / max(values.shape)
    if factor >= 1:
        return values
    grid = [max(1, round(cells * factor)) for cells in values.shape]
    return F.interpolate(values[None, None].float(), grid, mode="nearest-exact")[0, 0]


def write_scene_page(path: Path, scenes: Sequence[PageScene], title: str = "Scenes") -> Path:
    """Write the page.

    Args:
        path: of the HTML file.
        scenes: one at least, each with a layer at least.
        title: of the page.

    Raises:
        ValueError: nothing to show.
    """
    if not scenes or not all(scene.layers for scene in scenes):
        raise ValueError("expected at least one scene, and one layer in each, to write a page of")
    side = picture_side(sum(len(scene.layers) for scene in scenes))
    data = {"title": title, "ramps": _ramps(), "scenes": [_scene(scene, side) for scene in scenes]}
    parts = {
        "__TITLE__": html.escape(title),
        "__STYLE__": _resource("scene_page.css"),
        "__SCRIPT__": _resource("scene_page.js"),
        # last, as it holds names of others; "</script>" inside one would end the data
        "__DATA__": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = _resource("scene_page.html")
    for place, text in parts.items():
        page = page.replace(place, text, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _resource(name: str) -> str:
    return resources.files("restrike.viz").joinpath(name).read_text(encoding="utf-8").rstrip()


def _ramps() -> dict[str, str]:
    """256 colours each: depth as in `colorize_depth` (near is red, far is blue), confidence from dark to bright."""
    from matplotlib import colormaps

    names = {"depth": "turbo_r", "confidence": "viridis"}
    share = np.linspace(0, 1, 256)
    return {
        kind: _base64((255 * colormaps[name](share)[:, :3]).round().astype(np.uint8).tobytes())
        for kind, name in names.items()
    }


def _scene(scene: PageScene, side: int) -> dict[str, Any]:
    cameras = [layer.camera for layer in scene.layers if layer.camera is not None]
    poses = torch.stack([camera.world_to_camera.float() for camera in cameras]) if cameras else torch.zeros(0, 3, 4)
    points = torch.cat([layer.points.points for layer in scene.layers]).float()
    places = torch.cat([points, camera_centers(poses)]) if len(poses) else points
    center = points.median(0).values if len(points) else places.mean(0) if len(places) else torch.zeros(3)
    radius = float((places - center).norm(dim=-1).quantile(0.9)) if len(places) else 1.0
    levels = _confidence_levels(scene)
    length = frustum_length(poses, (points - center).norm(dim=-1)) if cameras else 1.0
    depths = [shrink_map(layer.depth, side) for layer in scene.layers if layer.depth is not None]
    low, high = depth_range(torch.cat([depth.flatten() for depth in depths]) if depths else torch.zeros(0))
    scale = _DepthScale(low, max(high, low + 1e-9), high > _LOG_SPAN * low > 0)
    return {
        "title": scene.title,
        "unit": scene.unit,
        "center": center.tolist(),
        "radius": max(radius, 1e-6),
        "up": upright(poses)[2].tolist() if cameras else [0.0, -1.0, 0.0],
        "confidence_values": None if levels is None else levels.tolist(),
        "depth_range": scale._asdict() if depths else None,
        "layers": [_layer(layer, levels, length, scale, side) for layer in scene.layers],
    }


class _DepthScale(NamedTuple):
    """What the ends of the depth colours mean, and whether they go by the logarithm in between."""

    low: float
    high: float
    is_log: bool

    def levels(self, depth: Tensor) -> np.ndarray:
        """uint8 [P, Q]: 0 where unknown, else 1 … 255."""
        known = (depth > 0) & depth.isfinite()
        values, (low, high) = torch.where(known, depth.float(), self.low), (self.low, self.high)
        share = (values / low).log() / float(np.log(high / low)) if self.is_log else (values - low) / (high - low)
        return torch.where(known, 1 + (254 * share.clamp(0, 1)).round(), 0).byte().numpy()


def _layer(layer: PageLayer, levels: np.ndarray | None, length: float, scale: _DepthScale, side: int) -> dict[str, Any]:
    cloud = layer.points
    entry: dict[str, Any] = {
        "name": layer.name,
        "color": list(layer.color),
        "count": len(cloud.points),
        "points": _base64(cloud.points.float().numpy().astype("<f4").tobytes()),
        "colors": _base64(cloud.colors.numpy().astype(np.uint8).tobytes()),
        "confidence": None,
        "camera": None,
        "picture": None,
        "depth": None,
        "sureness": None,
    }
    if cloud.confidence is not None and levels is not None:
        entry["confidence"] = _base64(_level_of(cloud.confidence, levels).tobytes())
    if layer.camera is not None:
        entry["camera"] = _camera(layer.camera, length)
    if layer.image is not None:
        entry["picture"] = _picture(layer.image, side)
    if layer.depth is not None:
        entry["depth"] = _png(scale.levels(shrink_map(layer.depth, side)))
    if layer.confidence is not None and levels is not None:
        entry["sureness"] = _png(_level_of(shrink_map(layer.confidence, side), levels))
    return entry


def _level_of(confidence: Tensor, levels: np.ndarray) -> np.ndarray:
    """uint8 of the same shape: which step of the slider still shows it."""
    found = np.searchsorted(levels, confidence.float().numpy(), side="right") - 1
    return found.clip(0, _LEVELS - 1).astype(np.uint8)


def _camera(camera: PageCamera, length: float) -> dict[str, Any]:
    intrinsics, pose = camera.intrinsics.float(), camera.world_to_camera.float()
    (fx, fy), (cx, cy) = (pair.tolist() for pair in split_intrinsics(intrinsics))
    return {
        "rotation": pose[:, :3].tolist(),
        "frustum": frustum(intrinsics, pose, camera.size, length).tolist(),
        "height": camera.size[0],
        "width": camera.size[1],
        "fx": fx, "fy": fy, "cx": cx, "cy": cy,
    }  # fmt: skip


def _confidence_levels(scene: PageScene) -> np.ndarray | None:
    """The slider's values: 256 quantiles of all confidences, so that each step hides as many points; None without."""
    known = [layer.points.confidence for layer in scene.layers if layer.points.confidence is not None]
    if not known or not sum(map(len, known)):
        return None
    return np.quantile(torch.cat(known).float().numpy(), np.linspace(0, 1, _LEVELS)).astype(np.float32)


def _picture(image: Tensor, side: int) -> str:
    from PIL import Image

    picture, buffer = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{_base64(buffer.getvalue())}"


def _png(levels: np.ndarray) -> str:
    """Without loss, as its grey values are numbers."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{_base64(buffer.getvalue())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
