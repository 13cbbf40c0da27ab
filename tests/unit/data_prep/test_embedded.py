"""The sets that ship with the library."""

from __future__ import annotations

import io
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from restrike.data_prep.embedded import crop_box, photo_names, prepare_digits, prepare_photos
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.pack import PackOptions
from shard_tools import read_with_webdataset


def options(name):
    return PackOptions(name=name, shards={"train": 2, "validation": 1})


def test_digits_are_lossless_and_split_by_writer(tmp_path):
    catalogue = prepare_digits(tmp_path, options("digits"))
    assert {name: split.samples for name, split in catalogue.splits.items()} == {"train": 1437, "validation": 360}
    assert catalogue.classes == [str(digit) for digit in range(10)]
    with resources.as_file(resources.files("restrike.data_prep") / "assets" / "digits_8x8.npz") as path:
        embedded = np.load(path)
        images, labels = embedded["images"], embedded["labels"]
    samples = {
        int(s["__key__"]): s
        for pattern in ("*train*.tar", "*val*.tar")
        for s in read_with_webdataset(tmp_path, pattern)
    }
    assert len(samples) == 1797
    for number in range(0, 1797, 97):
        pixels = np.asarray(Image.open(io.BytesIO(samples[number]["png"])))
        assert np.array_equal(pixels, images[number])
        assert int(samples[number]["cls"]) == labels[number]
    assert {int(s["__key__"]) for s in read_with_webdataset(tmp_path, "*val*.tar")} == set(range(1437, 1797))
    assert "CC BY 4.0" in (tmp_path / "images" / "LICENSE-digits.txt").read_text()


def test_photo_crops_for_training_and_validation_never_touch():
    assert len(photo_names()) == 16
    for photo in range(16):
        for size in ((300, 172), (560, 374), (400, 560)):
            train = [crop_box(size, "train", photo, crop) for crop in range(50)]
            val = [crop_box(size, "val", photo, crop) for crop in range(50)]
            assert max(box[2] for box in train) + 0.03 * size[0] < min(box[0] for box in val)
            assert all(0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
                       for left, top, right, bottom in train + val)  # fmt: skip


def test_photos_are_deterministic_and_of_both_colour_modes(tmp_path):
    catalogue = prepare_photos(tmp_path / "a", options("photos"), train_per_class=3, val_per_class=2)
    assert {name: split.samples for name, split in catalogue.splits.items()} == {"train": 48, "validation": 32}
    assert catalogue.classes == photo_names()
    again = prepare_photos(tmp_path / "b", options("photos"), train_per_class=3, val_per_class=2)
    assert again.checksum == catalogue.checksum
    modes = {
        Image.open(io.BytesIO(sample["jpg"])).mode for sample in read_with_webdataset(tmp_path / "a", "*train*.tar")
    }
    assert modes == {"RGB", "L"}


def test_every_photo_has_its_licence(tmp_path):
    text = (resources.files("restrike.data_prep") / "assets" / "LICENSE-photos.txt").read_text()
    for name in photo_names():
        assert f"\n{name}.jpg" in text


def test_a_tree_of_another_set_is_refused(tmp_path):
    prepare_photos(tmp_path, options("photos"), train_per_class=2, val_per_class=1)
    with pytest.raises(PrepareError, match="holds files of another set"):
        prepare_photos(tmp_path, options("photos"), train_per_class=1, val_per_class=1)
