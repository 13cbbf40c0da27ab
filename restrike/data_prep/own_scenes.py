"""Scenes of one's own: which layout a folder has, which frames are held out, and the typed sample that comes of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from restrike.data.folder import is_image
from restrike.data.multiview_batches import ViewTransform
from restrike.data.multiview_source import RawView
from restrike.data.multiview_transforms import VGGTViews
from restrike.data.samples import MultiViewSample
from restrike.data_prep.colmap import find_model, read_colmap
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.own_frames import OwnScene, read_pixels
from restrike.data_prep.photos import read_photos
from restrike.data_prep.transforms_json import read_transforms, transforms_files

Layout = Literal["auto", "photos", "colmap", "transforms"]
LAYOUTS: tuple[Layout, ...] = ("auto", "photos", "colmap", "transforms")
SUBSET = "own"
PARTS = ("train", "val", "test")
MAX_FRAMES = 32_767  # places in a subset are 16-bit numbers in the index


@dataclass(frozen=True)
class ReadOptions:
    """How to read a scene.

    Attributes:
        layout: "auto" takes transforms.json before a COLMAP model before photos.
        images: folder of the pictures inside a scene; None = the layout's usual one.
        depth_unit: scene units per count of a 16-bit depth PNG.
        scale: factor of the whole scene, cameras and depth.
        val_scenes: names of scenes that are held out whole.
        val_every: hold out every so manieth frame of the others, from the first on; 0 = none. A layout that has its
            own parts (transforms_train.json, train_filenames) keeps them.
    """

    layout: Layout = "auto"
    images: str | None = None
    depth_unit: float = 1e-3
    scale: float = 1.0
    val_scenes: tuple[str, ...] = ()
    val_every: int = 8


def find_layout(folder: Path) -> Layout | None:
    """What a folder holds; None if it is no scene."""
    if transforms_files(folder):
        return "transforms"
    if find_model(folder) is not None:
        return "colmap"
    places = [folder / "images", folder]
    if any(is_image(path.name) for place in places if place.is_dir() for path in place.iterdir() if path.is_file()):
        return "photos"
    return None


def find_scenes(src: Path) -> list[Path]:
    """`src` itself where it is a scene, else the scenes that it holds, sorted.

    Raises:
        PrepareError: neither.
    """
    if not src.is_dir():
        raise PrepareError(f"--src: no folder {src}; name a scene's folder, or one that holds several")
    if find_layout(src):
        return [src]
    found = sorted(path for path in src.iterdir() if path.is_dir() and find_layout(path))
    if not found:
        held = ", ".join(sorted(path.name for path in src.iterdir())[:5]) or "nothing"
        raise PrepareError(
            f"--src: {src} holds no scene (it holds {held}); expected transforms.json, a COLMAP model with images/, or "
            "photos, in it or in its folders"
        )
    return found


def scene_name(folder: Path) -> str:
    """A folder's name as a sequence's: letters, digits, _ and - only."""
    return re.sub(r"[^\w-]", "_", folder.resolve().name, flags=re.ASCII)


def read_scene(folder: Path, options: ReadOptions | None = None) -> OwnScene:
    """Cameras and frames of one scene, each frame with its part ("train" or "val"); no pixels yet.

    Raises:
        PrepareError: no scene, or a damaged one; names file and mend.
    """
    options = options or ReadOptions()
    layout = find_layout(folder) if options.layout == "auto" else options.layout
    name = scene_name(folder)
    if layout == "transforms":
        scene = read_transforms(folder, name, options.depth_unit)
    elif layout == "colmap":
        scene = read_colmap(folder, name, options.images)
    elif layout == "photos":
        scene = read_photos(folder, name, options.images)
    else:
        raise PrepareError(f"--src: {folder} holds no transforms.json, no COLMAP model and no photos")
    if len(scene.frames) > MAX_FRAMES:
        raise PrepareError(f"--src: {folder} has {len(scene.frames):,} frames, {MAX_FRAMES:,} at most; split the scene")
    return replace(scene, frames=[replace(f, part=_part(scene, i, options)) for i, f in enumerate(scene.frames)])


def _part(scene: OwnScene, row: int, options: ReadOptions) -> str:
    if scene.name in options.val_scenes:
        return "val"
    if (own := scene.frames[row].part) is not None or any(frame.part for frame in scene.frames):
        return own or "train"
    return "val" if options.val_every and row % options.val_every == 0 else "train"


def read_views(scene: OwnScene, rows: Sequence[int] | None = None, options: ReadOptions | None = None) -> list[RawView]:
    """Frames of a scene as the loader would give them; unknown cameras are NaN.

    Raises:
        DecodeError: a frame cannot be used; names the file.
    """
    options = options or ReadOptions()
    views = []
    for row in range(len(scene.frames)) if rows is None else rows:
        pixels = read_pixels(scene, scene.frames[row], scale=options.scale)
        camera = np.full((3, 4), np.nan) if pixels.world_to_camera is None else pixels.world_to_camera
        views.append(
            RawView(
                pixels.image, pixels.depth, pixels.depth_mask, pixels.foreground,
                pixels.intrinsics.astype(np.float32), camera.astype(np.float32), row,
            )
        )  # fmt: skip
    return views


def read_sample(
    folder: Path,
    size: tuple[int, int],
    rows: Sequence[int] | None = None,
    transform: ViewTransform | None = None,
    options: ReadOptions | None = None,
) -> MultiViewSample:
    """Frames of a scene's folder as one typed sample, without packing: for prediction, and for a look at the data.

    Args:
        folder: of photos, a COLMAP model or a transforms.json.
        size: (H, W) of the sample's images.
        rows: frames by their place in the sorted paths; None = all.
        transform: of a family, without augmentation; None = VGGT's with exact pixels.
        options: how to read.

    Returns:
        The sample. Of photos without cameras `world_to_camera` is NaN and `valid_depth` False.

    Raises:
        PrepareError, DecodeError: the scene, or a frame of it, cannot be used.
    """
    scene = read_scene(folder, options)
    views = read_views(scene, rows, options)
    transform = transform or VGGTViews(is_training=False, depth_percentile=100.0, exact_pixels=True)
    return transform(views, size, np.zeros(len(views), dtype=bool), np.random.default_rng(0))
