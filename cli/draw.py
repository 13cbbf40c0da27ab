"""`python -m cli doctor … --draw DIR`: samples of a multi-view recipe as pictures and as one page to turn and zoom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from cli.errors import UserError, shorten
from restrike.data.loader import WorkerOptions
from restrike.data.samples import MultiViewBatch
from restrike.viz.scene import SceneViews
from restrike.viz.scene_page import page_scene, write_scene_page
from restrike.viz.scene_views import draw_cameras, draw_views

DEFAULT_SAMPLES = 2
PAGE_NAME = "index.html"


@dataclass(frozen=True)
class DrawOptions:
    """Where to draw, and how many samples of the training and of the validation data each."""

    folder: Path
    samples: int = DEFAULT_SAMPLES


def take_options(argv: list[str]) -> tuple[DrawOptions | None, list[str]]:
    """`--draw DIR` and `--draw_samples N`, and the other tokens; None without `--draw`.

    Raises:
        UserError: a value that is missing or no number.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name not in ("--draw", "--draw_samples"):
            rest.append(token)
            continue
        value = value if equals else next(tokens, "")
        if not value or value.startswith("-"):
            raise UserError(f"{name} needs a value, as in {'--draw pictures' if name == '--draw' else f'{name} 4'}")
        found[name] = value
    number = found.get("--draw_samples", str(DEFAULT_SAMPLES))
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"--draw_samples: expected a whole number of 1 or more, got '{number}'")
    if "--draw" not in found:
        if "--draw_samples" in found:
            raise UserError("--draw_samples needs --draw DIR beside it")
        return None, rest
    return DrawOptions(Path(found["--draw"]), int(number)), rest


def draw(data_config: dict[str, Any], options: DrawOptions) -> list[Path]:
    """Draw samples of the datamodule that a config's `data` describes.

    Args:
        data_config: `class_path` and `init_args`.
        options: where, and how many.

    Returns:
        The pictures, and the page as the last.

    Raises:
        UserError: the data cannot be read, or is no multi-view data.
    """
    folder = options.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--draw: {folder} is a file; name a folder")
    try:
        data = build_data(data_config)
        scenes = [scene for split in ("train", "val") for scene in _samples(data, split, options.samples)]
    except (ValueError, OSError) as error:
        raise UserError(f"--draw: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for scene in scenes:
        name = re.sub(r"[^\w-]+", "_", scene.title)
        for kind, picture in (("views", draw_views(scene)), ("cameras", draw_cameras(scene))):
            files.append(folder / f"{name}_{kind}.png")
            picture.save(files[-1])
    title = f"Samples of {data_config.get('class_path', 'the data').rpartition('.')[2]}"
    return [*files, write_scene_page(folder / PAGE_NAME, [page_scene(scene) for scene in scenes], title)]


def build_data(data_config: dict[str, Any]) -> LightningDataModule:
    """The datamodule of a config, without workers: a few samples are not worth a process.

    Raises:
        ValueError: a value that it refuses.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    try:
        config = parser.parse_object({"data": data_config})
        data = parser.instantiate_classes(config).data
    except (ValueError, TypeError) as error:
        raise ValueError(shorten(str(error))) from error
    if isinstance(getattr(data, "workers", None), WorkerOptions):
        data.workers = replace(data.workers, num_workers=0)
    return data


def _samples(data: Any, split: str, count: int) -> Iterator[SceneViews]:
    """The first samples that a loader gives, titled "<split> <number> <key>"."""
    if split == "train":
        data.setup("fit")
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    drawn = 0
    for batch in loader:
        if not isinstance(batch, MultiViewBatch):
            raise ValueError(
                f"{type(data).__name__} gives {type(batch).__name__}; only multi-view data (MultiViewBatch) is drawn"
            )
        for row in range(len(batch.keys)):
            if bool(batch.valid[row]) and drawn < count:
                yield scene_views(batch, row, f"{split} {drawn} {batch.keys[row]}")
                drawn += 1
        if drawn >= count:
            return


def scene_views(batch: MultiViewBatch, row: int, title: str) -> SceneViews:
    """One row of a batch as the loader gives it: images not yet normalised."""
    images = batch.images[row]
    if images.dtype != torch.uint8:
        images = (255 * images.clamp(0, 1)).round().to(torch.uint8)
    known = batch.valid_depth[row] & (batch.depth[row] > 0)
    return SceneViews(
        title,
        [f"view {view}, frame {number}" for view, number in enumerate(batch.frame_numbers[row].tolist())],
        images,
        torch.where(known, batch.depth[row], 0.0),
        batch.intrinsics[row],
        batch.world_to_camera[row],
        batch.foreground[row],
    )
