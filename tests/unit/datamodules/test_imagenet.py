"""The datamodule: exact resume under a trainer, changed worlds, clear errors, and normalised batches."""

from __future__ import annotations

import contextlib
import logging
import types

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.imagenet import ImageNetDataModule
from restrike.data.batches import TooManyBadSamplesError
from restrike.data.plan import Position
from shard_tools import serve, write_set

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*logger.*",
    "ignore:.*is smaller than the logging interval",
    "ignore:.*Checkpoint directory",
    "ignore:.*shuffling enabled",
)
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_set(folder)
    return folder


def datamodule(data, **options):
    chosen = {
        "num_classes": 3, "image_size": 8, "batch_size_per_device": 4, "val_batch_size_per_device": 4,
        "num_workers": 0, "lanes": 4, "start_method": "fork", "worker_timeout_s": 60.0, "erase_prob": 0.5,
    }  # fmt: skip
    return ImageNetDataModule(str(data), **{**chosen, **options})


class Recorder(LightningModule):
    """Learns next to nothing and writes down all that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(3, 3)
        self.seen: list = []

    def training_step(self, batch, batch_idx):
        self.seen.append(
            (self.current_epoch, batch.keys, batch.seed, batch.images.sum().item(), batch.targets.tolist())
        )
        return self.net(batch.images.mean((2, 3))).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append(("val", batch.keys))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class StopAndSave(Callback):
    """Ends the run after a step as a fault would: a checkpoint is the last thing that happens."""

    def __init__(self, step: int, path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Stopped


class Stopped(Exception):
    pass


def fit(data, checkpoint=None, stop=None, **trainer):
    module, loader = Recorder(), datamodule(data, **trainer.pop("options", {}))
    callbacks = [StopAndSave(*stop)] if stop else []
    trainer = Trainer(**{"limit_val_batches": 0, "max_epochs": 3, "callbacks": callbacks, **QUIET, **trainer})
    with pytest.raises(Stopped) if stop else contextlib.nullcontext():
        trainer.fit(module, datamodule=loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return module.seen


@pytest.fixture(scope="module")
def unbroken(toy):
    """15 steps: 3 epochs of 5."""
    return fit(toy)


def test_an_unbroken_run_sees_every_image_each_epoch(unbroken):
    for epoch in range(3):
        keys = [key for number, keys, *_ in unbroken if number == epoch for key in keys]
        assert len(set(keys)) == 20


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [2, 5, 8, 10])
def test_a_run_stopped_at_any_step_goes_on_with_the_very_next_batch(toy, unbroken, tmp_path, step, workers):
    options = {"num_workers": workers}
    before = fit(toy, stop=(step, tmp_path / "x.ckpt"), options=options)
    after = fit(toy, checkpoint=tmp_path / "x.ckpt", options=options)
    assert before + after == unbroken


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7])
def test_a_run_with_short_epochs_resumes_exactly_too(toy, unbroken, tmp_path, step):
    limits = {"limit_train_batches": 2, "max_epochs": 5}
    before = fit(toy, stop=(step, tmp_path / "x.ckpt"), **limits)
    after = fit(toy, checkpoint=tmp_path / "x.ckpt", **limits)
    assert [batch[1:] for batch in before + after] == [batch[1:] for batch in unbroken[:10]]


@pytest.mark.parametrize("limit", [2, 3])
def test_short_epochs_walk_on_through_the_same_stream(toy, unbroken, limit):
    seen = fit(toy, limit_train_batches=limit, max_epochs=10 // limit)
    assert [batch[1:] for batch in seen] == [batch[1:] for batch in unbroken[: limit * (10 // limit)]]


def test_reloading_the_loader_each_epoch_changes_nothing(toy, unbroken):
    assert fit(toy, reload_dataloaders_every_n_epochs=1) == unbroken


def test_overfitting_shows_the_same_batches_again(toy):
    seen = [batch[1:] for batch in fit(toy, overfit_batches=2) if batch[0] != "val"]
    assert seen[:2] == seen[2:4] == seen[4:]


def test_a_second_fit_begins_anew(toy, unbroken):
    module, loader = Recorder(), datamodule(toy)
    for _ in range(2):
        Trainer(**{"limit_val_batches": 0, "max_epochs": 1, **QUIET}).fit(module, datamodule=loader)
    assert module.seen[:5] == module.seen[5:] == unbroken[:5]


def test_validation_between_epochs_does_not_disturb_training(toy, unbroken):
    seen = fit(toy, limit_val_batches=1.0)
    assert [batch for batch in seen if batch[0] != "val"] == unbroken
    assert len({key for batch in seen if batch[0] == "val" for key in batch[1] if key}) == 7


def test_http_shows_a_trainer_what_the_disk_shows(toy, unbroken, tmp_path):
    with serve(toy) as server:
        assert fit(server.url, options={"cache_dir": str(tmp_path / "cache"), "num_workers": 1}) == unbroken
        fetched = [path for path, _ in server.requests if "train" in path and path.endswith(".tar")]
        assert sorted(fetched) == [f"/toy-train-{number:04d}.tar" for number in range(3)]


def restore(toy, batch_size, world_size, state, caplog):
    caplog.set_level(logging.WARNING)
    module = datamodule(toy, batch_size_per_device=batch_size)
    module.trainer = types.SimpleNamespace(global_rank=0, world_size=world_size, current_epoch=0)
    module.setup("fit")
    module.load_state_dict({**module.state_dict(), **state})
    return module, module.train_dataloader().position


def test_other_ranks_with_the_same_global_batch_go_on_exactly(toy, caplog):
    saved = {"epoch": 1, "step": 3, "world_size": 1, "batch_size_per_device": 4}
    assert restore(toy, 2, 2, saved, caplog)[1] == Position(1, 3)
    assert not caplog.records


def test_another_global_batch_goes_on_at_the_nearest_step_and_says_so(toy, caplog):
    saved = {"epoch": 1, "step": 3, "world_size": 1, "batch_size_per_device": 4}
    assert restore(toy, 2, 1, saved, caplog)[1] == Position(1, 6)
    assert (
        "made with a global batch of 4, this run has 2 (2 x 1 ranks): it goes on at the nearest step, 6 of epoch 1"
        in caplog.text
    )


def test_other_data_or_another_seed_is_told(toy, caplog):
    restore(toy, 4, 1, {"epoch": 0, "step": 2, "seed": 5, "fingerprint": "other"}, caplog)
    assert "another seed and fingerprint of the data" in caplog.text


def test_the_state_is_small_and_plain(toy):
    module = datamodule(toy)
    module.setup("fit")
    next(iter(module.train_dataloader()))
    state = module.state_dict()
    assert state == {
        "epoch": 0, "step": 1, "seed": 0, "world_size": 1, "batch_size_per_device": 4, "lanes": 4,
        "fingerprint": state["fingerprint"],
    }  # fmt: skip
    assert all(isinstance(value, int | str) for value in state.values())


def test_facts_about_the_set_are_there_after_setup(toy):
    module = datamodule(toy)
    module.setup("fit")
    assert module.class_names == ["cat", "dog", "emu"]
    module.setup("test")
    assert module.class_counts == {"train": [7, 7, 6], "val": [3, 2, 2], "test": [3, 2, 2]}


def test_test_runs_on_the_validation_split_or_on_the_one_named(toy):
    module = datamodule(toy)
    module.setup("test")
    assert sum(int(batch.valid.sum()) for batch in module.test_dataloader()) == 7
    module = datamodule(toy, test_split="train")
    module.setup("test")
    assert sum(int(batch.valid.sum()) for batch in module.test_dataloader()) == 20


def test_a_folder_gives_the_same_images_as_shards(toy):
    shards, folder = datamodule(toy), datamodule(toy / "images", format="folder")
    for module in (shards, folder):
        module.setup("fit")
    ours = {key: batch.images[row] for batch in shards.val_dataloader() for row, key in enumerate(batch.keys) if key}
    for batch in folder.val_dataloader():
        for row, key in enumerate(batch.keys):
            if key:
                assert torch.equal(batch.images[row], ours[key.rpartition("/")[2].removesuffix(".JPEG")])
    assert len(folder.train_dataloader()) == 5


def test_batches_are_normalised_on_their_device_and_erased_in_training_only(toy):
    module = datamodule(toy, erase_prob=1.0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    module.trainer = types.SimpleNamespace(training=False)
    plain = module.on_after_batch_transfer(batch, 0).images
    assert torch.allclose(plain, (batch.images.float() / 255 - 0.5) / 0.25, atol=1e-6)
    module.trainer.training = True
    erased = [module.on_after_batch_transfer(batch, 0).images for _ in range(2)]
    assert torch.equal(erased[0], erased[1])
    assert all((one != other).any() for one, other in zip(erased[0], plain, strict=True))
    other = module.on_after_batch_transfer(batch._replace(seed=batch.seed + 1), 0).images
    assert not torch.equal(other, erased[0])


@pytest.mark.parametrize(
    ("options", "soft"),
    [
        ({}, True),
        ({"mixup": 0.0, "cutmix": 0.0}, True),  # label smoothing alone
        ({"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}, False),
    ],
)
def test_targets_are_soft_where_mixing_or_smoothing_asks_for_it(toy, options, soft):
    module = datamodule(toy, **options)
    module.setup("fit")
    targets = next(iter(module.train_dataloader())).targets
    assert targets.shape == ((4, 3) if soft else (4,))
    assert targets.dtype == (torch.float32 if soft else torch.int64)
    if soft:
        assert torch.allclose(targets.sum(1), torch.ones(4))


def test_an_odd_batch_with_mixing_is_refused_at_once(toy):
    with pytest.raises(ValueError, match=r"data\.batch_size_per_device: mixing pairs images"):
        datamodule(toy, batch_size_per_device=3)


def test_a_set_smaller_than_a_batch_is_refused(toy):
    module = datamodule(toy, batch_size_per_device=64)
    module.setup("fit")
    with pytest.raises(ValueError, match="the training split has 20 images, fewer than one global batch of 64"):
        module.train_dataloader()


def test_labels_out_of_range_are_told_before_the_first_step(tmp_path, caplog):
    from webdataset import TarWriter

    for split in ("train", "val"):
        with TarWriter(str(tmp_path / f"x-{split}-0.tar")) as writer:
            for number in range(8):
                writer.write({"__key__": f"n{number}", "jpg": b"", "cls": number})
    module = datamodule(tmp_path, max_bad_samples=4)
    with pytest.raises(
        TooManyBadSamplesError, match=r"5 images have no usable label; the first: 'n3' in shard .*label 3"
    ):
        module.setup("fit")
    module = datamodule(tmp_path, max_bad_samples=5, max_bad_val_samples=5)
    module.setup("fit")
    assert "5 images have no usable label" in caplog.text


def test_the_recipe_is_the_default():
    module = ImageNetDataModule("nowhere")
    transform, mixing = module.train_transform, module.mixing
    assert (transform.scale, transform.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert transform.interpolation == "random"
    assert transform.hflip == 0.5
    assert transform.rand_augment is not None
    assert (mixing.mixup_alpha, mixing.cutmix_alpha, mixing.prob, mixing.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert mixing.label_smoothing == 0.1
    assert (module.erase_prob, module.eval_transform.crop_pct) == (0.25, 0.875)
