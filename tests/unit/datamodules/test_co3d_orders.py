"""DiffusionSfM's test data: every sequence in several frame orders, with the size of its whole scene."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules import CO3DOrdersDataModule
from restrike.data.multiview_filter import SceneFilter
from restrike.data.multiview_plan import FixedShape
from restrike.data.multiview_transforms import DiffusionSfMViews
from restrike.data.views import RandomViews
from restrike.geometry import camera_centers
from training_tools import toy_trainer

HELD_OUT = SceneFilter(subsets=("fewview_dev/test",), min_quality=None, min_frames=2)


def datamodule(data: Path, **arguments: Any) -> CO3DOrdersDataModule:
    settings: dict[str, Any] = {
        "data": str(data),
        "sampler": RandomViews(),
        "shape": FixedShape(views=3, size=(56, 56), scenes=2),
        "transform": DiffusionSfMViews(depth_size=4),
        "filter": SceneFilter(subsets=("fewview_dev/train",), min_quality=None),
        "val_filter": HELD_OUT,
        "val_shape": FixedShape(views=3, size=(56, 56), scenes=3),
        "val_transform": DiffusionSfMViews(is_training=False, depth_size=4),
        "test_transform": DiffusionSfMViews(is_training=False, depth_size=28),
        "num_workers": 0,
    }
    return CO3DOrdersDataModule(**{**settings, **arguments})


def test_a_test_shows_each_sequence_once_an_order_with_fine_depth(toy_set, tmp_path):
    made = datamodule(toy_set, test_orders=2)
    made.trainer = toy_trainer(tmp_path)
    made.setup("test")
    batches = list(made.test_dataloader())
    keys = [key for batch in batches for key in batch.keys if key]
    assert len(keys) == len(set(keys)) == 2 * made.scene_counts["test"]
    assert {key.rpartition("#")[2] for key in keys} == {"0", "1"}
    categories = [key.partition("/")[0] for key in keys]
    assert categories == sorted(categories)  # a test that stops has whole categories behind it
    assert batches[0].depth.shape[-1] == 28
    frames = {key: batch.frame_numbers[row].tolist() for batch in batches for row, key in enumerate(batch.keys)}
    first = keys[0].rpartition("#")[0]
    assert frames[f"{first}#0"] != frames[f"{first}#1"]
    written = json.loads((tmp_path / "test_frames_1.json").read_text())["frames"]
    category, sequence = first.split("/")
    assert written[category][sequence] == frames[f"{first}#1"]


def test_the_size_of_a_scene_is_that_of_all_its_cameras(toy_set, tmp_path):
    made = datamodule(toy_set)
    made.trainer = toy_trainer(tmp_path)
    made.setup("test")
    source = made._source("test")
    centers = camera_centers(torch.from_numpy(source.cameras(0)).double())
    want = (centers - centers.mean(0)).norm(dim=-1).max()
    assert made.scene_scales[source.key(0)] == pytest.approx(float(want), rel=1e-5)
    assert len(source.cameras(0)) > 3


def test_published_orders_are_read_from_their_folders(toy_set, tmp_path):
    plain = datamodule(toy_set, test_orders=1)
    plain.trainer = toy_trainer(tmp_path)
    plain.setup("test")
    source = plain._source("test")
    for category in set(source.categories):
        own = [k for k, name in enumerate(source.categories) if name == category]
        folder = tmp_path / "orders" / "co3d_v2_random_order_0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{category}.json").write_text(json.dumps({source.sequences[k]: [2, 0, 1] for k in own}))
    made = datamodule(toy_set, test_orders=1, test_order_files=str(tmp_path / "orders"))
    made.trainer = plain.trainer
    made.setup("test")
    batch = next(iter(made.test_dataloader()))
    scene = next(k for k in range(len(source)) if source.key(k) == batch.keys[0].partition("#")[0])
    assert batch.frame_numbers[0].tolist() == source.numbers[source.rows[scene][[2, 0, 1]]].tolist()


def test_the_depth_size_of_a_model_overrides_the_transforms(toy_set, tmp_path):
    made = datamodule(toy_set, depth_size=8)
    made.trainer = toy_trainer(tmp_path)
    made.setup("fit")
    assert next(iter(made.val_dataloader())).depth.shape[-1] == 8
    with pytest.raises(ValueError, match="data.test_orders: expected 1 or more, got 0"):
        datamodule(toy_set, test_orders=0)


def test_the_mean_motion_is_that_of_the_training_sequences(toy_set, tmp_path):
    made = datamodule(toy_set, test_mean_motion=True)
    made.trainer = toy_trainer(tmp_path)
    made.setup("test")
    assert made.mean_motion.shape == (3, 3, 4)
    torch.testing.assert_close(made.mean_motion[0], torch.eye(3, 4), atol=1e-5, rtol=0)
    held_out, training = made._source("test"), made._source("train")
    assert not {training.key(k) for k in range(len(training))} & {held_out.key(k) for k in range(len(held_out))}
