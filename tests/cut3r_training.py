"""Random scenes for CUT3R's training module, in a datamodule that counts its own steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule

from lightning_modules import RecurrentReconstructionModule
from multiview_cases import random_scene
from restrike.data.samples import MultiViewBatch
from tiny_cut3r import SIZES
from training_tools import toy_trainer


def random_batch(seed: int, scenes: int = 2, views: int = 4, size: tuple[int, int] = (32, 32)) -> MultiViewBatch:
    """Every pixel has a depth, so means over a batch are means of means over its halves."""
    generator = torch.Generator().manual_seed(seed)
    scene = random_scene(seed, views, scenes, size, torch.float32)
    shape = scenes, views
    everywhere = torch.ones(*shape, *size, dtype=torch.bool)
    return MultiViewBatch(
        images=2 * torch.rand(*shape, 3, *size, generator=generator) - 1,
        depth=scene.depth,
        valid_depth=everywhere,
        foreground=everywhere,
        intrinsics=scene.intrinsics,
        world_to_camera=scene.world_to_camera,
        crop_boxes=torch.zeros(*shape, 4),
        source_sizes=torch.zeros(*shape, 2, dtype=torch.int64),
        frame_numbers=torch.arange(views).expand(shape),
        is_video=torch.ones(shape, dtype=torch.bool),
        valid=torch.ones(scenes, dtype=torch.bool),
        keys=[f"apple/{seed}_{i}" for i in range(scenes)],
        seed=seed,
    )


def rows(batch: MultiViewBatch, start: int, stop: int) -> MultiViewBatch:
    """Some of a batch's scenes."""
    parts = {n: x[start:stop] for n, x in batch._asdict().items() if isinstance(x, torch.Tensor)}
    return batch._replace(**parts, keys=batch.keys[start:stop])


class _Batches:
    def __init__(self, data: SceneData, views: list[int]) -> None:
        self.data, self.views = data, views

    def __len__(self) -> int:
        return len(self.views)

    def __iter__(self) -> Iterator[MultiViewBatch]:
        trainer = self.data.trainer
        for index, views in enumerate(self.views):
            batch = random_batch(index, self.data.scenes, views)
            share = self.data.scenes // trainer.world_size
            yield rows(batch, trainer.global_rank * share, (trainer.global_rank + 1) * share)


class SceneData(LightningDataModule):
    """One batch for each view count; ranks share its scenes."""

    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, views: list[int], scenes: int = 2) -> None:
        super().__init__()
        self.views, self.scenes = views, scenes

    def train_dataloader(self) -> _Batches:
        return _Batches(self, self.views)

    def val_dataloader(self) -> _Batches:
        return _Batches(self, self.views[:1])

    test_dataloader = val_dataloader


def tiny_module(**arguments: Any) -> RecurrentReconstructionModule:
    """From a fixed seed."""
    torch.manual_seed(0)
    settings = {
        "model_name": "cut3r_224_linear",
        "model_args": {**SIZES, "enc_depth": 1, "dec_depth": 2},
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "schedule": "constant",
    }
    return RecurrentReconstructionModule(**{**settings, **arguments})


def fit(root: Path, views: list[int], *callbacks: Callback, scenes: int = 2, trainer: Any = None, **arguments: Any):
    """A trained module."""
    module = tiny_module(**arguments)
    settings = {"max_epochs": 1, "limit_val_batches": 0, "gradient_clip_val": 1.0, **(trainer or {})}
    toy_trainer(root, callbacks=list(callbacks), **settings).fit(module, datamodule=SceneData(views, scenes))
    return module
