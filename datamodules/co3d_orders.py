"""CO3D with DiffusionSfM's test (arXiv 2505.05473): every test sequence in several frame orders, seen and unseen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.co3d import CO3DDataModule
from restrike.data.batches import LoadedBatch, Request
from restrike.data.loader import EvalLoader
from restrike.data.multiview_batches import SceneEvalBatches, create_scene_eval_loader
from restrike.data.multiview_filter import SceneFilter
from restrike.data.multiview_frames import (
    DrawnViews,
    draw_every_scene,
    find_frames,
    frame_lists_of,
    load_frame_orders,
    save_frame_lists,
)
from restrike.data.multiview_transforms import DiffusionSfMViews
from restrike.data.samples import MultiViewBatch
from restrike.metrics.camera_pose import camera_scene_scale
from restrike.metrics.multiview import mean_cameras


class CO3DOrdersDataModule(CO3DDataModule):
    """As `CO3DDataModule`; `test` shows each sequence once for each order, first category first.

    Keys of test batches are "<category>/<sequence>#<order>". Scenes of one category follow each other.

    Args:
        depth_size: Side of the depth maps in training and validation; null takes the transforms'.
        test_filter: Sequences and frames to test on; null takes `val_filter`.
        test_transform: With depth at the resolution of the comparison; null takes `val_transform`.
        test_orders: Orders of each sequence.
        test_order_files: Folder with `co3d_v2_random_order_<0…>/<category>.json`, as RelPose++ publishes them. null
            draws the orders from `seed`, and writes them into the run folder.
        test_mean_motion: Also find the mean motion of the training sequences, as `val_sampler` draws them, which a test
            then reports beside the network.
        data: Everything else; see `CO3DDataModule`.
    """

    def __init__(
        self,
        depth_size: int | None = None,
        test_filter: SceneFilter | None = None,
        test_transform: DiffusionSfMViews | None = None,
        test_orders: int = 5,
        test_order_files: str | None = None,
        test_mean_motion: bool = False,
        **data: Any,
    ) -> None:
        super().__init__(**data)
        if depth_size is not None:
            self.transform = replace(self.transform, depth_size=depth_size)  # type: ignore[call-arg]
            self.val_transform = replace(self.val_transform, depth_size=depth_size)  # type: ignore[call-arg]
        if test_orders < 1:
            raise ValueError(f"data.test_orders: expected 1 or more, got {test_orders}")
        self.filters["test"] = test_filter or self.filters["val"]
        self.test_transform = test_transform or self.val_transform
        self.test_orders, self.test_order_files = test_orders, test_order_files
        self.scene_scales: dict[str, float] = {}
        self.test_mean_motion = test_mean_motion
        self.mean_motion: Tensor | None = None  # world_to_camera [V, 3, 4], from setup on
        self._orders: list[list[DrawnViews]] = []

    def setup(self, stage: str) -> None:
        """Open what the stage needs; for a test also the size of each scene, over all cameras of its sequence."""
        if stage != "test":
            super().setup(stage)
            return
        source = self._source("test")
        self._orders = [self._order(number) for number in range(self.test_orders)]
        self.scene_scales = {
            source.key(scene): float(camera_scene_scale(torch.from_numpy(source.cameras(scene))))
            for scene in range(len(source))
        }
        if self.test_mean_motion:
            training = self._source("train")
            drawn = draw_every_scene(training, self.val_sampler, self.val_shape.views, self.seed)
            cameras = [torch.from_numpy(training.cameras(one.scene)[one.positions]).double() for one in drawn]
            self.mean_motion = mean_cameras(torch.stack(cameras)).float()

    @property
    def evaluation_frames(self) -> str | None:
        """As in `CO3DDataModule`; of a test with a hash for each order."""
        return self._describe(self._source("test"), self._orders) if self._orders else super().evaluation_frames

    def test_dataloader(self) -> EvalLoader:
        """Each sequence in each order, once over all ranks."""
        source = self._source("test")
        drawn = [(order, views) for order, list_ in enumerate(self._orders) for views in list_]
        drawn.sort(key=lambda one: (source.categories[one[1].scene], one[0]))
        batches = _OrderedScenes(
            source,
            [views for _, views in drawn],
            self.val_shape,
            self.test_transform,
            self.seed,
            self.max_bad_val_samples,
        )
        batches.orders = [order for order, _ in drawn]
        loader = create_scene_eval_loader(batches, self.workers, self.rank, self.world_size)
        self._loaders.add(loader)
        return loader

    def _order(self, number: int) -> list[DrawnViews]:
        source, views = self._source("test"), self.val_shape.views
        if self.test_order_files is not None:
            folder = Path(self.test_order_files).expanduser() / f"co3d_v2_random_order_{number}"
            return find_frames(source, load_frame_orders(folder, source), views, str(folder))
        drawn = draw_every_scene(source, self.val_sampler, views, self.seed + number)
        if self.trainer and self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / f"test_frames_{number}.json"
            save_frame_lists(path, frame_lists_of(source, drawn))
        return drawn


class _OrderedScenes(SceneEvalBatches):
    """Names the order of each scene in its key."""

    orders: list[int]

    def __getitem__(self, request: Request) -> LoadedBatch:
        loaded = super().__getitem__(request)
        batch = loaded.batch
        if not isinstance(batch, MultiViewBatch):
            return loaded
        ids = request.ids.tolist()
        keys = [f"{key}#{self.orders[i]}" if i >= 0 else key for key, i in zip(batch.keys, ids, strict=True)]
        return loaded._replace(batch=batch._replace(keys=keys))
