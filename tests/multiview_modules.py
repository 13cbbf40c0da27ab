"""A small datamodule of every multi-view family, and what it hands over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from datamodules import CO3DDataModule
from restrike.data.color_jitter import ColorJitter
from restrike.data.multiview_filter import SceneFilter
from restrike.data.multiview_plan import DynamicShape, FixedShape, PooledShape
from restrike.data.multiview_transforms import CUT3RViews, DiffusionSfMViews, VGGTViews
from restrike.data.samples import MultiViewBatch
from restrike.data.views import RandomViews, WindowViews

FAMILIES = ("diffusionsfm", "cut3r", "vggt")


def datamodule(family: str, data: Path | str, **changes: Any) -> CO3DDataModule:
    jitter = ColorJitter(prob=0.9, gray_prob=0.05, same_prob=0.7)
    parts: dict[str, dict[str, Any]] = {
        "diffusionsfm": {
            "sampler": RandomViews(),
            "shape": FixedShape(4, (28, 28), 2, min_views=2),
            "transform": DiffusionSfMViews(depth_size=7),
            "val_transform": DiffusionSfMViews(is_training=False, depth_size=7),
        },
        "cut3r": {
            "sampler": WindowViews(),
            "shape": PooledShape(4, ((32, 32), (24, 32)), 2, vary_views=True),
            "transform": CUT3RViews(jitter=ColorJitter(as_uint8=True)),
            "val_transform": CUT3RViews(is_training=False),
            "epoch_length": 20,
        },
        "vggt": {
            "sampler": RandomViews(repeat=True),
            "shape": DynamicShape(6, 28, max_img_per_gpu=8),
            "transform": VGGTViews(jitter=jitter),
            "val_transform": VGGTViews(is_training=False),
            "order": "independent",
            "steps_per_epoch": 6,
        },
    }
    common: dict[str, Any] = {
        "val_shape": FixedShape(3, (28, 28), 3),
        "filter": SceneFilter(subsets=("fewview_dev/train",), min_quality=None),
        "val_filter": SceneFilter(subsets=("fewview_dev/test",), min_quality=None),
        "num_workers": 0,
        "seed": 5,
    }
    return CO3DDataModule(str(data), **{**common, **parts[family], **changes})


def batches_of(module: CO3DDataModule, count: int) -> list[MultiViewBatch]:
    module.setup("fit")
    loader = module.train_dataloader()
    found: list[Any] = []
    while len(found) < count:
        # the range first: zip would take one batch too many from the loader
        found += [batch for _, batch in zip(range(count - len(found)), loader, strict=False)]
    loader.close()
    return found


def same(one: MultiViewBatch, two: MultiViewBatch) -> bool:
    pairs = list(zip(one, two, strict=True))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
