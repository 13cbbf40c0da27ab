"""A predicted scene in the formats of other tools, in one new folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from callbacks.log_predictions import to_uint8
from restrike.data.photos import copy_upright, plain_names
from restrike.data.predicted_views import PredictedViews, cell_centers, crop_pixel_intrinsics
from restrike.export.files import new_folder
from restrike.export.scene import PhotoCameras, ScenePoints, join_points, lift_points, surest_points
from restrike.export.scene_colmap import write_colmap
from restrike.export.scene_glb import write_glb
from restrike.export.scene_npz import write_cameras_npz, write_view_npz
from restrike.export.scene_ply import write_ply
from restrike.export.scene_transforms import write_transforms
from restrike.export.scene_windows import WindowView, join_window, place_view
from restrike.geometry import check_cameras, compose_se3, invert_se3
from restrike.viz.scene import ColoredPoints
from restrike.viz.scene_page import (
    PageCamera,
    PageLayer,
    PageScene,
    picture_side,
    shrink_map,
    view_color,
    write_scene_page,
)

_NO_CAMERA = "the network found no camera"


class WriteScene(Callback):
    """Writes what a multi-view network says of a folder of photos: `index.html` (a page to turn it in), a COLMAP model
    (`sparse/0`, `images`), `transforms.json`, `points.ply`, `scene.glb`, `cameras.npz` and `views/*.npz`.

    The folder is `data.out`. It appears when it is whole, or not at all. The world is the first photo's camera.
    `predict_step` must return a dict with "views": `restrike.data.predicted_views.PredictedViews`. Memory holds
    `max_points` points, and of each photo a small picture with its depth, the smaller the more photos there are; whole
    depth maps go to the disk at once.

    Args:
        max_points: In points.ply and scene.glb.
        colmap_points: In the COLMAP model.
        page_points: On the page.
        drop_least_confident: Share of the points that these files (not the page, which has a slider) leave out, the
            least confident ones. Without effect where the family has no confidence.
        copy_images: Write `images`, upright and under the names that the files use.
        write_depth: Write `views`.
    """

    def __init__(
        self,
        max_points: int = 1_000_000,
        colmap_points: int = 100_000,
        page_points: int = 150_000,
        drop_least_confident: float = 0.2,
        copy_images: bool = True,
        write_depth: bool = True,
    ) -> None:
        counts = {"max_points": max_points, "colmap_points": colmap_points, "page_points": page_points}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"callbacks.write_scene.{name}: expected 1 or more, got {value}")
        if not 0 <= drop_least_confident < 1:
            raise ValueError(f"callbacks.write_scene.drop_least_confident: expected [0, 1), got {drop_least_confident}")
        self.max_points, self.colmap_points, self.page_points = max_points, colmap_points, page_points
        self.drop_least_confident = drop_least_confident
        self.copy_images, self.write_depth = copy_images, write_depth
        self._stack = contextlib.ExitStack()
        self._folder = Path()
        self._scene = _Scene()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the folder.

        Raises:
            ValueError: several devices, or a folder that is there already or cannot be written.
        """
        if trainer.world_size > 1:
            raise ValueError(
                f"one scene is predicted on one device: set trainer.devices to 1 (got {trainer.world_size})"
            )
        self._scene = _Scene()
        self._stack = contextlib.ExitStack()
        self._folder = self._stack.enter_context(new_folder(trainer.datamodule.out))  # type: ignore[attr-defined]
        self._names = dict(zip(_data(trainer).paths, plain_names(_data(trainer).paths), strict=True))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Place the views of a batch in the world, and write what is large.

        Raises:
            ValueError: the network says no depth.
        """
        data = _data(trainer)
        if "views" not in outputs:
            raise ValueError("model: this network has no depth head (model.model_args), so there is no scene to write")
        said = PredictedViews(*(None if x is None else x[0].detach().float().cpu() for x in outputs["views"]))
        boxes, sizes, images = (x[0].cpu() for x in (batch.crop_boxes, batch.source_sizes, batch.images))
        window = {
            key: WindowView(
                said.intrinsics[v],
                said.world_to_camera[v],
                said.depth[v],
                None if said.confidence is None else said.confidence[v],
                boxes[v].float(),
            )
            for v, key in enumerate(batch.keys)
            if _is_camera(said.world_to_camera[v], said.intrinsics[v])
        }
        placed = self._scene.place(window, is_same_world=data.is_streaming)
        budget, side = max(1, self.max_points // len(data.paths)), picture_side(len(data.paths))
        for v, key in enumerate(batch.keys):
            if key in placed and key not in self._scene.rows:
                picture = to_uint8(images[v : v + 1], data)[0]
                self._scene.add(key, self._names[key], placed[key], sizes[v], picture, budget, side)
                self._write_view(key, placed[key], data.root)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files, and let the folder appear.

        Raises:
            ValueError: not one photo could be used.
        """
        data, scene = _data(trainer), self._scene
        left_out = {path: data.skipped.get(path, _NO_CAMERA) for path in data.paths if path not in scene.rows}
        if not scene.rows:
            path, reason = next(iter(left_out.items()))
            raise ValueError(
                f"no scene was written: none of the {len(left_out)} photos in {data.images} could be used; "
                f"the first, {path}: {reason}"
            )
        cameras, points = scene.cameras(), join_points(scene.points)
        sure = surest_points(points, self.drop_least_confident)
        folder = self._folder
        write_colmap(folder / "sparse" / "0", cameras, thin(sure, self.colmap_points))
        write_ply(folder / "points.ply", sure)
        write_transforms(folder / "transforms.json", cameras, points="points.ply")
        write_glb(folder / "scene.glb", cameras, sure)
        views = [_view_file(name) if self.write_depth else "" for name in cameras.names]
        write_cameras_npz(folder / "cameras.npz", cameras, list(scene.rows), views)
        title = data.images.resolve().name
        write_scene_page(folder / "index.html", [scene.page(title, points, self.page_points)], title)
        if left_out:
            text = "".join(f"{path}\t{reason}\n" for path, reason in left_out.items())
            (folder / "skipped.txt").write_text(text, encoding="utf-8")
        self._stack.close()
        note = f", {len(left_out)} left out (skipped.txt)" if left_out else ""
        rank_zero_info(f"{len(cameras)} photos{note}, {len(sure.points):,} points: {data.out / 'index.html'}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._stack.__exit__(type(exception), exception, exception.__traceback__)

    def _write_view(self, key: str, view: WindowView, root: Path) -> None:
        name = self._names[key]
        if self.copy_images:
            copy_upright(root / key, self._folder / "images" / name)
        if self.write_depth:
            write_view_npz(self._folder / _view_file(name), view.depth, view.confidence, view.crop_box)


class _Camera(NamedTuple):
    name: str
    size: Tensor
    view: WindowView  # with small maps
    picture: Tensor  # a small one
    network_size: tuple[int, int]


class _Scene:
    """Views in the world of the first one, as they come."""

    def __init__(self) -> None:
        self.rows: dict[str, _Camera] = {}
        self.points: list[ScenePoints] = []
        self._first: Tensor | None = None
        self._last: dict[str, WindowView] = {}

    def place(self, window: dict[str, WindowView], is_same_world: bool) -> dict[str, WindowView]:
        """A window's views in the scene's world: by the first camera, or by what it shares with the window before."""
        if not window:
            return {}
        if self._first is None:
            self._first = next(iter(window.values())).world_to_camera
        if is_same_world or not self._last:
            back = invert_se3(self._first)
            placed = {k: v._replace(world_to_camera=compose_se3(v.world_to_camera, back)) for k, v in window.items()}
        else:
            shared = [key for key in window if key in self._last]
            if not shared:
                raise ValueError(
                    "two windows of photos share no photo: give a data.overlap above 0 (larger where photos could not "
                    "be read), or a larger data.max_views"
                )
            found = join_window([window[key] for key in shared], [self._last[key] for key in shared])
            placed = {key: place_view(view, found) for key, view in window.items()}
        self._last = {} if is_same_world else placed
        return placed

    def add(
        self, key: str, name: str, view: WindowView, size: Tensor, picture: Tensor, max_points: int, side: int
    ) -> None:
        """Keep a view's camera, some of its points, and picture and maps of `side` pixels at most; `picture` [3, H, W]
        is what the network saw."""
        grid = (view.depth.shape[0], view.depth.shape[1])
        colors = F.interpolate(picture[None].float(), grid, mode="area")[0].round().byte()
        shrink = min(1.0, side / max(picture.shape[1:]))
        small = [max(1, round(pixels * shrink)) for pixels in picture.shape[1:]]
        shown = F.interpolate(picture[None].float(), small, mode="area")[0].round().byte()
        confidence = None if view.confidence is None else shrink_map(view.confidence, side).clone()
        kept = view._replace(depth=shrink_map(view.depth, side).clone(), confidence=confidence)
        self.rows[key] = _Camera(name, size, kept, shown, (picture.shape[1], picture.shape[2]))
        pixels = cell_centers(view.crop_box, grid)
        pose, photo = (view.intrinsics, view.world_to_camera), (int(size[0]), int(size[1]))
        row = len(self.rows) - 1
        self.points.append(lift_points(view.depth, pixels, colors, pose, photo, row, view.confidence, max_points))

    def cameras(self) -> PhotoCameras:
        rows = list(self.rows.values())
        return PhotoCameras(
            [row.name for row in rows],
            torch.stack([row.size for row in rows]),
            torch.stack([row.view.intrinsics for row in rows]),
            torch.stack([row.view.world_to_camera for row in rows]),
        )

    def page(self, title: str, points: ScenePoints, max_points: int) -> PageScene:
        """The scene as the page shows it: with the crops that the network saw."""
        layers, budget = [], max(1, max_points // len(self.rows))
        for row, (key, camera) in enumerate(self.rows.items()):
            own = self.points[row].select(torch.arange(min(budget, len(self.points[row].points))))
            confidence = None if points.confidence is None else own.confidence
            intrinsics = crop_pixel_intrinsics(camera.view.intrinsics, camera.view.crop_box, camera.network_size)
            pose = PageCamera(intrinsics, camera.view.world_to_camera, camera.network_size)
            cloud = ColoredPoints(own.points, own.colors, confidence)
            color, maps = view_color(row, len(self.rows)), (camera.view.depth, camera.view.confidence)
            layers.append(PageLayer(key, cloud, pose, camera.picture, color, *maps))
        return PageScene(title, layers)


def thin(points: ScenePoints, count: int) -> ScenePoints:
    """At most `count` points, evenly over all."""
    if len(points.points) <= count:
        return points
    return points.select(torch.linspace(0, len(points.points) - 1, count).round().long())


def _view_file(name: str) -> str:
    return f"views/{name}.npz"


def _is_camera(world_to_camera: Tensor, intrinsics: Tensor) -> bool:
    try:
        check_cameras(world_to_camera, intrinsics)
    except ValueError:
        return False
    return True


def _data(trainer: Trainer) -> Any:
    """The data module: `paths`, `skipped`, `root`, `images`, `out`, `is_streaming`, `mean`, `std`."""
    return trainer.datamodule  # type: ignore[attr-defined]
