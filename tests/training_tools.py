"""A toy to train: a few random images in a datamodule that keeps its own position, and a trainer without noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer

from lightning_modules import ClassificationModule
from restrike.data.samples import ImageBatch

NUM_CLASSES = 4


def make_batch(index: int, size: int = 4, image_size: int = 32, num_padding: int = 0) -> ImageBatch:
    """A batch that its index determines. Images of a class share a colour, so there is something to learn."""
    generator = torch.Generator().manual_seed(index)
    targets = torch.randint(0, NUM_CLASSES, (size,), generator=generator)
    images = 0.5 * torch.randn(size, 3, image_size, image_size, generator=generator)
    images[:, 0] += targets[:, None, None].float() - 1.5
    valid = torch.arange(size) < size - num_padding
    return ImageBatch(images, targets, valid, [f"{index}-{row}" for row in range(size)], index)


class _Batches:
    """A loader: Lightning takes any iterable that has a length."""

    def __init__(self, data: ToyData, split: str) -> None:
        self.data, self.split = data, split

    def __len__(self) -> int:
        return len(self.data.order) if self.split == "train" else 2

    def __iter__(self) -> Iterator[ImageBatch]:
        if self.split != "train":
            yield from (self.data.batch(10_000 + i, num_padding=i) for i in range(len(self)))
            return
        self.data.begin_epoch_if_done()
        while self.data.position < len(self):
            index = self.data.order[self.data.position]
            self.data.position += 1  # counted as it is handed over
            yield self.data.batch(100 * self.data.epoch + index)


class ToyData(LightningDataModule):
    """Training batches that depend on (epoch, position) alone; the datamodule keeps the position.

    Args:
        order: Indices of the batches of every epoch.
        batch_size_per_device: Images of a batch.
        poison: Indices whose batch has a NaN, on the last rank.
    """

    num_classes = NUM_CLASSES
    class_names = ["red", "green", "blue", "grey"]
    class_counts = {"test": [1, 4, 1, 1]}
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(
        self, order: Sequence[int] = range(4), batch_size_per_device: int = 4, poison: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.order, self.batch_size_per_device, self.poison = order, batch_size_per_device, poison
        self.epoch = self.position = 0

    def batch(self, index: int, num_padding: int = 0) -> ImageBatch:
        rank = self.trainer.global_rank
        batch = make_batch(index * self.trainer.world_size + rank, self.batch_size_per_device, num_padding=num_padding)
        if index in self.poison and rank == self.trainer.world_size - 1:
            batch.images[0] = torch.nan
        return batch

    def begin_epoch_if_done(self) -> None:
        if self.position == len(self.order):
            self.epoch, self.position = self.epoch + 1, 0

    def train_dataloader(self) -> _Batches:
        return _Batches(self, "train")

    def val_dataloader(self) -> _Batches:
        return _Batches(self, "val")

    test_dataloader = predict_dataloader = val_dataloader

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.begin_epoch_if_done()


def toy_module(**arguments: Any) -> ClassificationModule:
    """A tiny ResNet (BatchNorm, no dropout) from a fixed seed."""
    torch.manual_seed(0)
    settings = {"model_name": "test_resnet", "num_classes": NUM_CLASSES, "lr": 1e-3, "schedule": "constant"}
    return ClassificationModule(**{**settings, **arguments})


def toy_trainer(root: Path, **arguments: Any) -> Trainer:
    """One CPU process, no files but those that a test asks for."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "max_epochs": 2,
    }
    return Trainer(**{**settings, **arguments})


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not equal bit by bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
