"""The folder of photos as batches: how much is read ahead, and what is refused."""

from __future__ import annotations

import os

import pytest
import torch
from PIL import Image

from datamodules import PhotoFolderDataModule
from restrike.data.photo_views import VGGTPhotos


def made(tmp_path, count: int, **options) -> PhotoFolderDataModule:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (28, 14), (number, 0, 0)).save(folder / f"{number}.png")
    data = PhotoFolderDataModule(str(folder), str(tmp_path / "out"), VGGTPhotos(28, 14), **options)
    data.setup("predict")
    return data


def test_batches_come_in_order_and_overlap(tmp_path):
    batches = list(made(tmp_path, 5, max_views=3, overlap=1).predict_dataloader())
    assert [batch.keys for batch in batches] == [["0.png", "1.png", "2.png"], ["2.png", "3.png", "4.png"]]
    assert batches[1].images[0, :, 0, 0, 0].tolist() == [2, 3, 4]
    assert batches[0].images.shape == (1, 3, 3, 14, 28) and batches[0].crop_boxes.shape == (1, 3, 4)


def test_no_more_than_two_windows_are_ever_read(tmp_path, monkeypatch):
    data, loaded = made(tmp_path, 30, is_streaming=True), []
    monkeypatch.setattr(data, "load", lambda path, load=data.load: (loaded.append(path), load(path))[1])
    for number, batch in enumerate(data.predict_dataloader(), start=1):
        assert batch.keys == [f"{number - 1}.png"] and len(loaded) <= number + 1
    assert len(loaded) == 30


def test_of_ten_thousand_photos_only_those_that_are_taken_are_opened(tmp_path, monkeypatch):
    data = made(tmp_path, 1)
    for number in range(1, 10_000):
        os.link(data.images / "0.png", data.images / f"{number}.png")
    data.max_photos, opened = 20, []
    monkeypatch.setattr(data, "load", lambda path, load=data.load: (opened.append(path), load(path))[1])
    data.setup("predict")
    assert opened == [] and data.paths[0] == "0.png" and data.paths[-1] == "9999.png"  # by value, and evenly
    (batch,) = data.predict_dataloader()
    assert sorted(opened) == sorted(data.paths) and batch.images.shape[1] == 20


def test_normalising_is_the_transfer_hooks(tmp_path):
    data = made(tmp_path, 1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    batch = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)
    assert torch.equal(batch.images, torch.full_like(batch.images, -1))


def test_photos_are_for_prediction_only(tmp_path):
    data = made(tmp_path, 1)
    with pytest.raises(ValueError, match="only predict does not"):
        data.setup("test")


@pytest.mark.parametrize("option", [{"max_views": 0}, {"max_photos": 0}, {"num_threads": 0}])
def test_counts_below_one_are_refused_by_name(tmp_path, option):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(option))}: expected 1 or more, got 0"):
        made(tmp_path, 1, **option)
