"""Pictures of multi-view predictions: which, when, and by whom they are drawn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from callbacks import LogViews
from cut3r_training import SceneData, random_batch, tiny_module
from restrike.data.predicted_views import PredictedViews
from training_tools import toy_trainer


class Outputs(Callback):
    """What each step of an evaluation returned."""

    def __init__(self) -> None:
        self.of_batch: dict[int, Any] = {}

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.of_batch[batch_idx] = outputs

    on_test_batch_end = on_validation_batch_end


class TwoBatches(SceneData):
    def val_dataloader(self):
        return self.train_dataloader()

    test_dataloader = val_dataloader


def test_each_evaluation_draws_the_scenes_of_its_first_batch(tmp_path):
    seen = Outputs()
    trainer = toy_trainer(tmp_path, max_epochs=3, callbacks=[LogViews(num_scenes=1, every_n_epochs=2, tile=24), seen])
    module, data = tiny_module(test_untrained=True), TwoBatches([4, 3])
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    names = {f"val_step_000000{step}_apple_0_0.png" for step in (2, 6)}
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == names | {"test_apple_0_0.png"}
    assert seen.of_batch[1] is None and seen.of_batch[0]["views"].depth.shape == (2, 4, 32, 32)
    with torch.no_grad():
        said = module.eval()(random_batch(0).images)
    torch.testing.assert_close(seen.of_batch[0]["views"].depth, said.points_camera[..., 2])  # not the untrained one's


def outputs(views: int = 3) -> dict[str, Any]:
    batch = random_batch(0, views=views)
    batch = batch._replace(crop_boxes=torch.tensor([0.0, 0, 32, 32]).expand(2, views, 4))
    return {"batch": batch, "views": PredictedViews(batch.world_to_camera, batch.intrinsics, batch.depth)}


def end_of_batch(root: Path, said: Any, rank: int = 0, batch_idx: int = 0, **options: Any) -> list[Path]:
    trainer: Any = SimpleNamespace(
        sanity_checking=False, current_epoch=0, global_step=7, is_global_zero=rank == 0, default_root_dir=str(root),
        datamodule=SceneData([3]), loggers=[],
    )  # fmt: skip
    module: Any = None
    LogViews(tile=24, **options).on_validation_batch_end(trainer, module, said, None, batch_idx)
    return sorted(root.rglob("*.png"))


def test_many_views_are_thinned(tmp_path):
    few, many = (end_of_batch(tmp_path / name, outputs(views), max_views=4) for name, views in (("a", 4), ("b", 9)))
    assert len(few) == len(many) == 2
    with Image.open(few[0]) as four, Image.open(many[0]) as thinned:
        assert four.size == thinned.size


@pytest.mark.parametrize(
    "said, options",
    [(outputs(), {"rank": 1}), (outputs(), {"batch_idx": 1}), (None, {}), ({"views": None}, {})],
    ids=["another rank", "a later batch", "a step that returns nothing", "a step that predicts"],
)
def test_there_is_no_picture_of(said, options, tmp_path):
    assert end_of_batch(tmp_path, said, **options) == []


def test_loggers_that_take_images_get_them(tmp_path):
    got: list[Any] = []
    logger = SimpleNamespace(log_image=lambda key, images, step: got.append((key, Path(images[0]).name, step)))
    trainer: Any = SimpleNamespace(
        global_step=7, is_global_zero=True, default_root_dir=str(tmp_path), datamodule=SceneData([3]),
        loggers=[logger, SimpleNamespace()],
    )  # fmt: skip
    LogViews(tile=24).on_test_batch_end(trainer, trainer, outputs(), None, 0)
    assert got == [(f"predictions/test_{row}", f"test_apple_0_{row}.png", 7) for row in (0, 1)]


def test_options_below_one_are_refused():
    with pytest.raises(ValueError, match=r"callbacks.views: expected .* at least 1"):
        LogViews(num_scenes=0)
