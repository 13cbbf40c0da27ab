"""Any folder of images, for prediction."""

from __future__ import annotations

import types

import pytest

from datamodules.image_folder import ImageFolderDataModule
from restrike.data.batches import TooManyBadSamplesError
from shard_tools import JPEGS, picture, write_tree


def datamodule(images, **options):
    chosen = {"image_size": 8, "batch_size_per_device": 2, "num_workers": 0, "num_classes": 3}
    return ImageFolderDataModule(str(images), **{**chosen, **options})


def predicted(module):
    module.setup("predict")
    return [
        (key, int(target))
        for batch in module.predict_dataloader()
        for key, target, valid in zip(batch.keys, batch.targets, batch.valid, strict=True)
        if valid
    ]


def test_a_flat_or_nested_folder_needs_no_labels(tmp_path):
    for name in ("b.jpg", "a.png", "deep/er/c.JPEG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1, kind="PNG" if name.endswith("png") else "JPEG"))
    (tmp_path / "notes.txt").write_text("no image")
    assert predicted(datamodule(tmp_path)) == [("a.png", -1), ("b.jpg", -1), ("deep/er/c.JPEG", -1)]


def test_one_file_is_a_set_too(tmp_path):
    (tmp_path / "x.jpg").write_bytes(picture(1))
    assert predicted(datamodule(tmp_path / "x.jpg")) == [("x.jpg", -1)]


def test_class_folders_give_labels_where_asked(tmp_path):
    tree = write_tree(tmp_path)
    module = datamodule(tree / "val", labelled=True)
    assert sorted({label for _, label in predicted(module)}) == [0, 1, 2]
    module.setup("test")
    assert module.class_names == ["cat", "dog", "emu"]
    assert module.class_counts["test"] == [3, 2, 2]
    assert sum(int(batch.valid.sum()) for batch in module.test_dataloader()) == 7


def test_ranks_share_the_images(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    seen = []
    for rank in range(3):
        module = datamodule(tmp_path)
        module.trainer = types.SimpleNamespace(global_rank=rank, world_size=3)
        seen += predicted(module)
    assert sorted(key for key, _ in seen) == [f"{number}.jpg" for number in range(5)]


def test_a_broken_image_ends_the_run_or_is_left_out(tmp_path):
    (tmp_path / "good.jpg").write_bytes(picture(1))
    (tmp_path / "bad.jpg").write_bytes((JPEGS / "corrupt_truncated_60pct.jpg").read_bytes())
    with pytest.raises(TooManyBadSamplesError, match=r"'bad\.jpg' in folder"):
        predicted(datamodule(tmp_path))
    assert predicted(datamodule(tmp_path, max_bad_samples=1)) == [("good.jpg", -1)]


def test_mistakes_name_the_option(tmp_path):
    with pytest.raises(ValueError, match=r"data\.images: no such file or folder"):
        datamodule(tmp_path / "nowhere").setup("predict")
    with pytest.raises(ValueError, match=r"data\.images: no image \(jpg, "):
        datamodule(tmp_path).setup("predict")
    (tmp_path / "x.jpg").write_bytes(picture(1))
    with pytest.raises(ValueError, match=r"data\.labelled is false: test needs labels"):
        datamodule(tmp_path).setup("test")
    with pytest.raises(ValueError, match=r"data\.class_names_file: no such file"):
        datamodule(tmp_path, class_names_file=str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"has 2 lines, data\.num_classes is 3"):
        datamodule(tmp_path, class_names_file=str(tmp_path / "names.txt"))


def test_names_come_from_the_file_where_given(tmp_path):
    (tmp_path / "x.jpg").write_bytes(picture(1))
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    module = datamodule(tmp_path, class_names_file=str(tmp_path / "names.txt"))
    module.setup("predict")
    assert module.class_names == ["ant", "bee", "cow"]
