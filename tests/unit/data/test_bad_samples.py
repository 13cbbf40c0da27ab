"""Bad images are counted, named and replaced in training, fatal in evaluation, and never hang or pass in silence."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest

from restrike.data.batches import Request, TooManyBadSamplesError, TrainBatches
from restrike.data.folder import list_image_folder
from restrike.data.loader import WorkerOptions, create_eval_loader, create_train_loader
from restrike.data.source import FolderSource
from restrike.data.transforms import EvalTransform, TrainTransform
from shard_tools import JPEGS, NumberedSource, number_image, refuse_odd, write_tree

ALONE = WorkerOptions(num_workers=0)
TWO = WorkerOptions(num_workers=2, start_method="fork", timeout_s=60.0)


def loader(source, options=ALONE, max_bad_samples=10, transform=number_image):
    return create_train_loader(source, transform, None, 4, 0, options=options, max_bad_samples=max_bad_samples)


@pytest.mark.parametrize("options", [ALONE, TWO], ids=["0 workers", "2 workers"])
def test_a_bad_sample_is_logged_and_the_next_one_takes_its_place(caplog, options):
    caplog.set_level(logging.WARNING)
    loads = loader(NumberedSource(16, bad=(5, 6)), options)
    keys = [key for batch in loads for key in batch.keys]
    assert len(keys) == 16
    assert keys.count("sample7") == 3
    assert "sample5" not in keys
    assert "sample6" not in keys
    assert loads.bad_samples.count == 3  # 5 was replaced by 6, which is bad itself; and 6 in its own place
    assert "'sample5' in a source of numbers: made bad for the test" in caplog.text


def test_the_last_sample_is_replaced_by_the_first():
    batches = TrainBatches(NumberedSource(8, bad=(7,)), number_image, None, 0, max_bad_samples=1)
    assert batches[Request(0, 0, np.array([7]))].batch.keys == ["sample0"]


def test_images_that_do_not_decode_are_replaced_too():
    loads = loader(NumberedSource(16), max_bad_samples=8, transform=refuse_odd)
    assert all(int(key.removeprefix("sample")) % 2 == 0 for batch in loads for key in batch.keys)
    assert loads.bad_samples.count == 8


@pytest.mark.parametrize("options", [ALONE, TWO], ids=["0 workers", "2 workers"])
def test_more_than_the_bound_ends_the_run_with_a_name(options):
    with pytest.raises(TooManyBadSamplesError, match="^more than max_bad_samples = 3 .*made bad for the test"):
        list(loader(NumberedSource(32, bad=tuple(range(0, 32, 4))), options, max_bad_samples=3))


@pytest.mark.parametrize("options", [ALONE, TWO], ids=["0 workers", "2 workers"])
def test_too_many_in_one_batch_end_the_run_with_one_message(options):
    with pytest.raises(TooManyBadSamplesError) as caught:
        list(loader(NumberedSource(32, bad=tuple(range(30))), options, max_bad_samples=3))
    assert "Traceback" not in str(caught.value)
    assert "in a source of numbers: made bad for the test" in str(caught.value)


def test_the_count_is_over_all_workers_and_begins_anew_each_epoch():
    loads = loader(NumberedSource(32, bad=(1, 9, 17, 25)), TWO, max_bad_samples=4)
    for _ in range(3):
        list(loads)
        assert loads.bad_samples.count == 4


def test_a_set_without_any_usable_image_ends_and_does_not_hang():
    with pytest.raises(TooManyBadSamplesError):
        list(loader(NumberedSource(8, bad=tuple(range(8))), max_bad_samples=1000))


@pytest.mark.parametrize("options", [ALONE, TWO], ids=["0 workers", "2 workers"])
def test_a_bad_sample_ends_an_evaluation_at_once(options):
    with pytest.raises(TooManyBadSamplesError, match="'sample5' in a source of numbers"):
        list(create_eval_loader(NumberedSource(8, bad=(5,)), number_image, 2, 4, options=options))


def test_evaluation_may_leave_bad_samples_out():
    loads = create_eval_loader(NumberedSource(8, bad=(5,)), number_image, 2, 4, options=ALONE, max_bad_samples=1)
    valid = [key for batch in loads for key, ok in zip(batch.keys, batch.valid, strict=True) if ok]
    assert valid == [f"sample{number}" for number in range(8) if number != 5]
    assert loads.bad_samples.count == 1


def test_a_label_out_of_range_is_a_bad_sample(caplog):
    source = NumberedSource(8)
    source.labels[3] = 99
    list(loader(source))
    assert "'sample3' in a source of numbers: label 99 is out of range: the set has classes 0 to 3" in caplog.text


@pytest.fixture
def zoo(tmp_path):
    """A folder with every kind of odd and broken JPEG among good images."""
    tree = write_tree(tmp_path, train=12)
    for path in JPEGS.iterdir():
        shutil.copy(path, tree / "train" / "cat" / path.name)
    listing = list_image_folder(tree / "train", "data.data")
    return FolderSource(tree / "train", listing.paths, listing.labels, listing.classes)


def test_odd_images_load_and_broken_ones_are_named(zoo, caplog):
    loads = create_train_loader(
        zoo, TrainTransform(16, max_pixels=500_000), None, 2, 0, options=ALONE, max_bad_samples=10
    )
    keys = {key for batch in loads for key in batch.keys}
    for good in (
        "coffee_300x200_cmyk",
        "chelsea_225x150_gray",
        "astronaut_64x64_png_content_named",
        "rocket_17x13_tiny",
    ):
        assert f"cat/{good}.jpg" in keys
    for bad in ("corrupt_truncated_60pct", "corrupt_empty", "hubble_1000x872_q75"):
        assert f"cat/{bad}.jpg" not in keys
        assert f"'cat/{bad}.jpg' in folder" in caplog.text
    assert "more than max_pixels" in caplog.text


def test_a_broken_image_ends_an_evaluation(zoo):
    with pytest.raises(TooManyBadSamplesError, match=r"'cat/corrupt_\w+\.jpg'"):
        list(create_eval_loader(zoo, EvalTransform(16), 16, 4, options=ALONE))
