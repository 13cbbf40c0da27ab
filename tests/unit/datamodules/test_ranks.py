"""Two real processes over gloo: metrics equal one process's exactly, training shares the images."""

from __future__ import annotations

import types

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from datamodules.imagenet import ImageNetDataModule
from restrike.metrics import classification_metrics
from shard_tools import write_set


def evaluate(data, rank, world_size):
    """Accuracy of a fixed guess from the pixels, and what this rank was shown."""
    module = ImageNetDataModule(
        data, num_classes=3, image_size=8, batch_size_per_device=2, val_batch_size_per_device=2, num_workers=0, lanes=4
    )
    module.trainer = types.SimpleNamespace(global_rank=rank, world_size=world_size, current_epoch=0)
    module.setup("fit")
    metrics, batches = classification_metrics("val/"), 0
    for batch in module.val_dataloader():
        batches += 1
        logits = batch.images.float().mean((2, 3))
        metrics.update(logits, batch.targets, batch.valid)
    keys = [key for batch in module.train_dataloader() for key in batch.keys]
    return {name: value.item() for name, value in metrics.compute().items()}, batches, keys


def run(rank, data, init, results):
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    results.put((rank, *evaluate(data, rank, 2)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """11 validation images in shards of 6 and 5: uneven in every way."""
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, train=22, val=11, shards=(3, 2))
    return folder


def test_two_ranks_measure_exactly_what_one_does(toy, tmp_path):
    alone, _, keys_alone = evaluate(str(toy), 0, 1)
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(run, (str(toy), str(tmp_path / "init"), results), nprocs=2)
    outcomes = sorted(results.get() for _ in range(2))
    for _, metrics, _, _ in outcomes:
        assert {name: value for name, value in metrics.items() if name != "val/loss"} == {
            name: value for name, value in alone.items() if name != "val/loss"
        }
        assert metrics["val/loss"] == pytest.approx(alone["val/loss"], rel=1e-6)  # a sum in another order
    assert [batches for _, _, batches, _ in outcomes] == [3, 3]
    keys = [outcome[3] for outcome in outcomes]
    assert len(keys[0]) == len(keys[1]) == 10  # 22 images, global batch of 4: two are dropped
    assert not set(keys[0]) & set(keys[1])
    assert 0 < alone["val/top1"] < 1
    assert len(keys_alone) == 22
