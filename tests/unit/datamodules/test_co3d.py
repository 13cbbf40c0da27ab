"""The multi-view datamodule: every family's sampler over one set, resumable, the same for workers and ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from datamodules import CO3DDataModule
from multiview_modules import FAMILIES, batches_of, datamodule, same
from multiview_sets import copy_set
from restrike.data.batches import TooManyBadSamplesError
from restrike.data.multiview_filter import SceneFilter
from restrike.data.multiview_index import SceneIndex
from restrike.data.multiview_plan import FixedShape
from restrike.data.samples import MultiViewBatch


@pytest.mark.parametrize("family", FAMILIES)
def test_two_epochs_of_every_family_give_whole_batches(toy_set: Path, family: str) -> None:
    module = datamodule(family, toy_set)
    module.setup("fit")
    assert module.scene_counts == {"train": 12, "val": 4}
    steps = len(module.train_dataloader())
    for batch in batches_of(datamodule(family, toy_set), 2 * steps):
        scenes, views = batch.images.shape[:2]
        assert batch.valid.all() and len(batch.keys) == scenes
        assert batch.depth.shape[:2] == batch.frame_numbers.shape == (scenes, views)
        assert bool(batch.valid_depth.any()) and bool((batch.depth[batch.valid_depth] > 0).all())
        ready = module.on_after_batch_transfer(batch, 0)
        assert ready.images.dtype == torch.float32 and bool(ready.images.isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_the_same_for_any_number_of_workers(toy_set: Path, family: str) -> None:
    alone = batches_of(datamodule(family, toy_set), 5)
    helped = batches_of(datamodule(family, toy_set, num_workers=2), 5)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))
    assert not same(alone[0], alone[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_sees_what_the_unbroken_one_saw(toy_set: Path, family: str) -> None:
    whole = batches_of(datamodule(family, toy_set), 9)
    for stop in (1, 6, 7):
        first = datamodule(family, toy_set)
        batches_of(first, stop)
        second = datamodule(family, toy_set)
        second.setup("fit")
        second.load_state_dict(first.state_dict())
        loader = second.train_dataloader()
        rest: list[Any] = []
        while len(rest) < 9 - stop:
            rest += list(loader)
        assert all(same(a, b) for a, b in zip(whole[stop:], rest, strict=False)), stop


def test_other_ranks_see_the_same_scenes_of_a_global_batch(toy_set: Path, monkeypatch) -> None:
    whole = batches_of(datamodule("diffusionsfm", toy_set), 3)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(CO3DDataModule, "rank", rank)
        monkeypatch.setattr(CO3DDataModule, "world_size", 2)
        halves.append(batches_of(datamodule("diffusionsfm", toy_set, shape=FixedShape(4, (28, 28), 1, min_views=2)), 3))
    for step in range(3):
        assert whole[step].keys == halves[0][step].keys + halves[1][step].keys
        assert torch.equal(whole[step].images, torch.cat([half[step].images for half in halves]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world", [1, 3, 5])
def test_validation_sees_each_sequence_once(toy_set: Path, family: str, world: int, monkeypatch) -> None:
    seen: list[str] = []
    counts = set()
    for rank in range(world):
        monkeypatch.setattr(CO3DDataModule, "rank", rank)
        monkeypatch.setattr(CO3DDataModule, "world_size", world)
        module = datamodule(family, toy_set)
        module.setup("validate")
        batches: list[Any] = list(module.val_dataloader())
        counts.add(len(batches))
        assert all(batch.images.shape[:2] == (3, 3) for batch in batches)
        seen += [key for batch in batches for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid]
    assert len(counts) == 1 and len(seen) == len(set(seen)) == 4


def test_a_damaged_scene_is_replaced_counted_and_bounded(toy_set: Path, tmp_path: Path) -> None:
    data = copy_set(toy_set, tmp_path)
    tar = sorted(data.glob("*apple-0000.tar"))[0]
    index = SceneIndex.load(tar.with_suffix(".idx"))
    with open(tar, "r+b") as file:
        for offset in index.offsets[index.first[1] : index.first[2], 0].tolist():
            file.seek(offset)
            file.write(bytes(16))
    module = datamodule("diffusionsfm", data, max_bad_samples=3)
    found = batches_of(module, 6)
    bad = bytes(index.keys[1]).decode().replace("-", "/", 1)
    assert all(bad not in batch.keys and batch.images.shape[0] == 2 for batch in found)
    assert module.bad_samples == 1
    with pytest.raises(TooManyBadSamplesError, match=bad):
        batches_of(datamodule("diffusionsfm", data, max_bad_samples=0), 6)


def test_filters_that_leave_nothing_are_told_before_training(toy_set: Path) -> None:
    for name in ("filter", "val_filter"):
        module = datamodule("vggt", toy_set, **{name: SceneFilter(min_quality=100)})
        with pytest.raises(ValueError, match=f"data.{name} leaves no sequence"):
            module.setup("fit")


class Net(LightningModule):
    """Records the keys that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.seen: list[list[str]] = []

    def training_step(self, batch: MultiViewBatch, _: int) -> torch.Tensor:
        self.seen.append(batch.keys)
        return self.layer(batch.images.mean((1, 3, 4))).mean()

    def validation_step(self, batch: MultiViewBatch, _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_resumes_in_the_middle_of_an_epoch(toy_set: Path, tmp_path: Path) -> None:
    def fit(steps: int, **options: Any) -> Net:
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path, enable_checkpointing=False,
        )  # fmt: skip
        net = Net()
        trainer.fit(net, datamodule=datamodule("cut3r", toy_set), **options)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        return net

    whole = fit(14).seen
    fit(4)
    assert fit(14, ckpt_path=tmp_path / "x.ckpt", weights_only=False).seen == whole[4:]
