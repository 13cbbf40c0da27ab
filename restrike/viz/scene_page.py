"""One self-contained HTML page with a rotatable 3-D view of scenes: points, cameras, thumbnails.

It asks the network for nothing, and its content security policy forbids it to.
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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restrike.geometry import camera_centers, split_intrinsics
from restrike.viz.scene import ColoredPoints, SceneViews, view_points
from restrike.viz.scene_views import frustum, frustum_length, upright

_THUMBNAIL = 160  # pixels, long side
_LEVELS = 256  # of the confidence slider


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
    """

    name: str
    points: ColoredPoints
    camera: PageCamera | None = None
    image: Tensor | None = None
    color: tuple[int, int, int] = (120, 200, 255)


@dataclass(frozen=True)
class PageScene:
    """A scene to choose: its title and layers. Views of a data set, predictions, or both beside each other."""

    title: str
    layers: Sequence[PageLayer] = field(default_factory=list)


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
        )
        for view in range(len(scene))
    ]
    return PageScene(scene.title, layers)


def view_color(view: int, views: int) -> tuple[int, int, int]:
    """Of a view's frustum: hues in a circle."""
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb(view / views, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


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
    data = json.dumps({"title": title, "scenes": [_scene(scene) for scene in scenes]}, separators=(",", ":"))
    page = resources.files("restrike.viz").joinpath("scene_page.html").read_text(encoding="utf-8")
    # "</script>" inside a name would end the data
    page = page.replace("__TITLE__", html.escape(title)).replace("__DATA__", data.replace("<", "\\u003c"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _scene(scene: PageScene) -> dict[str, Any]:
    cameras = [layer.camera for layer in scene.layers if layer.camera is not None]
    poses = torch.stack([camera.world_to_camera.float() for camera in cameras]) if cameras else torch.zeros(0, 3, 4)
    points = torch.cat([layer.points.points for layer in scene.layers]).float()
    places = torch.cat([points, camera_centers(poses)]) if len(poses) else points
    center = points.median(0).values if len(points) else places.mean(0) if len(places) else torch.zeros(3)
    radius = float((places - center).norm(dim=-1).quantile(0.9)) if len(places) else 1.0
    levels = _confidence_levels(scene)
    length = frustum_length(poses, (points - center).norm(dim=-1)) if cameras else 1.0
    return {
        "title": scene.title,
        "center": center.tolist(),
        "radius": max(radius, 1e-6),
        "up": upright(poses)[2].tolist() if cameras else [0.0, -1.0, 0.0],
        "confidence_values": None if levels is None else levels.tolist(),
        "layers": [_layer(layer, levels, length) for layer in scene.layers],
    }


def _layer(layer: PageLayer, levels: np.ndarray | None, length: float) -> dict[str, Any]:
    cloud = layer.points
    entry: dict[str, Any] = {
        "name": layer.name,
        "color": list(layer.color),
        "count": len(cloud.points),
        "points": _base64(cloud.points.float().numpy().astype("<f4").tobytes()),
        "colors": _base64(cloud.colors.numpy().astype(np.uint8).tobytes()),
        "confidence": None,
        "camera": None,
        "thumbnail": None,
    }
    if cloud.confidence is not None and levels is not None:
        level = np.searchsorted(levels, cloud.confidence.float().numpy(), side="right") - 1
        entry["confidence"] = _base64(level.clip(0, _LEVELS - 1).astype(np.uint8).tobytes())
    if layer.camera is not None:
        entry["camera"] = _camera(layer.camera, length)
    if layer.image is not None:
        entry["thumbnail"] = f"data:image/jpeg;base64,{_base64(_thumbnail(layer.image))}"
    return entry


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


def _thumbnail(image: Tensor) -> bytes:
    from PIL import Image

    picture, buffer = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
