"""Packing: the public layout, equal bytes however often it was interrupted, and bad images by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from restrike.data.catalogue import load_catalogue
from restrike.data_prep import pack as pack_module
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.imagenet import prepare_imagenet
from restrike.data_prep.pack import PackOptions, make_keys
from restrike.data_prep.shard_writer import write_shard
from shard_tools import JPEGS, picture, read_with_webdataset, write_set, write_tree

ROOT = Path(__file__).resolve().parents[3]


def options(**more):
    return PackOptions(**{"name": "toy", "shards": {"train": 3, "validation": 2}, **more})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


def test_stock_webdataset_reads_the_shards_in_the_public_layout(tmp_path, tree):
    out = tmp_path / "out"
    prepare_imagenet(tree, out, options())
    assert [path.name for path in sorted(out.glob("*.tar"))] == [
        *(f"toy-train-{number:04d}.tar" for number in range(3)),
        *(f"toy-validation-{number:02d}.tar" for number in range(2)),
    ]
    samples = {sample["__key__"]: sample for sample in read_with_webdataset(out, "toy-train-*.tar", decode=True)}
    theirs = ImageFolder(tree / "train")
    assert len(samples) == len(theirs) == 20
    for path, label in theirs.samples:
        image, ours, about = (samples[Path(path).stem][name] for name in ("jpg", "cls", "json"))
        assert ours == label == about["label"]
        assert about == {"class": Path(path).parent.name, "filename": str(Path(path).relative_to(tree)), "label": label}
        assert np.array_equal(image, np.asarray(theirs.loader(path)))


def test_the_catalogue_says_what_is_there(tmp_path, tree):
    catalogue = prepare_imagenet(tree, tmp_path / "out", options(seed=3))
    assert catalogue == load_catalogue(tmp_path / "out" / "catalogue.json")
    assert catalogue.classes == ["cat", "dog", "emu"]
    assert catalogue.seed == 3
    assert catalogue.max_side is None
    assert {name: split.samples for name, split in catalogue.splits.items()} == {"train": 20, "validation": 7}
    assert catalogue.splits["train"].class_counts == [7, 7, 6]
    assert [shard.samples for shard in catalogue.splits["train"].shards] == [7, 7, 6]
    assert all(
        shard.bytes == (tmp_path / "out" / shard.name).stat().st_size for shard in catalogue.splits["train"].shards
    )


def test_images_are_permuted_over_all_shards_and_the_seed_decides(tmp_path, tree):
    def keys(seed):
        out = tmp_path / str(seed)
        prepare_imagenet(tree, out, options(seed=seed))
        return [sample["__key__"] for sample in read_with_webdataset(out, "toy-train-*.tar")]

    assert sorted(keys(0)) == sorted(keys(1))
    assert keys(0) not in (sorted(keys(0)), keys(1))


def test_packing_twice_and_with_several_workers_gives_equal_bytes(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(pack_module, "_IMAGES_PER_WORKER", 1)
    prepare_imagenet(tree, tmp_path / "one", options())
    prepare_imagenet(tree, tmp_path / "two", options(workers=2))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_second_run_keeps_what_is_finished(tmp_path, tree, capsys):
    prepare_imagenet(tree, tmp_path / "out", options())
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    prepare_imagenet(tree, tmp_path / "out", options())
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")} == times


@pytest.mark.parametrize("victim", ["toy-train-0001.tar", "toy-train-0001.idx", ".prepare/toy-train-0001.tar.json"])
def test_a_run_goes_on_from_any_missing_piece(tmp_path, tree, victim):
    prepare_imagenet(tree, tmp_path / "out", options())
    whole = files(tmp_path / "out")
    (tmp_path / "out" / victim).unlink()
    (tmp_path / "out" / "catalogue.json").unlink()
    (tmp_path / "out" / "toy-train-0002.tar.partial-99").write_bytes(b"half")
    prepare_imagenet(tree, tmp_path / "out", options())
    assert files(tmp_path / "out") == whole


def test_a_shard_whose_images_changed_is_written_again(tmp_path, tree):
    prepare_imagenet(tree, tmp_path / "out", options())
    before = files(tmp_path / "out")
    (tree / "train" / "cat" / "train_0000.JPEG").write_bytes(picture(77))
    prepare_imagenet(tree, tmp_path / "out", options())
    changed = {name for name, data in files(tmp_path / "out").items() if data != before[name]}
    assert {name.rpartition(".")[2] for name in changed} == {"tar", "idx", "json"}
    assert len([name for name in changed if name.endswith(".tar")]) == 1


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path):
    tree = write_tree(tmp_path / "tree", train=400, val=40)
    chosen = {"name": "toy", "shards": {"train": 40, "validation": 4}, "workers": 2}
    code = (
        "from pathlib import Path; from restrike.data_prep.imagenet import prepare_imagenet; "
        "from restrike.data_prep import pack; from restrike.data_prep.pack import PackOptions\n"
        "pack._IMAGES_PER_WORKER = 1\n"
        f"if __name__ == '__main__': prepare_imagenet(Path({str(tree)!r}), Path('out'), PackOptions(**{chosen!r}))"
    )
    (tmp_path / "run.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    out = tmp_path / "out"
    while len(list(out.glob("*.tar"))) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(out.glob("*.tar")))
    assert 5 <= finished < 44, "killed too late to prove anything"
    chosen["workers"] = 1
    time.sleep(1.0)  # the orphaned workers notice and leave
    prepare_imagenet(tree, out, PackOptions(**chosen))
    prepare_imagenet(tree, tmp_path / "unbroken", PackOptions(**chosen))
    assert files(out) == files(tmp_path / "unbroken")


def test_unreadable_images_are_left_out_named_and_counted(tmp_path, tree):
    for name in (
        "corrupt_empty",
        "corrupt_truncated_60pct",
        "coffee_300x200_cmyk",
        "astronaut_64x64_png_content_named",
    ):
        (tree / "train" / "dog" / f"{name}.jpg").write_bytes((JPEGS / f"{name}.jpg").read_bytes())
    catalogue = prepare_imagenet(tree, tmp_path / "out", options(max_bad=2))
    assert catalogue.splits["train"].samples == 22
    report = (tmp_path / "out" / "bad_images.txt").read_text().splitlines()
    assert report[0] == "# 2 unreadable images of 31; left out of the shards"
    assert [line.split("\t")[0] for line in report[2:]] == [
        "train/dog/corrupt_empty.jpg",
        "train/dog/corrupt_truncated_60pct.jpg",
    ]
    prepare_imagenet(tree, tmp_path / "out", options(max_bad=2))  # kept shards still report theirs
    assert (tmp_path / "out" / "bad_images.txt").read_text().splitlines() == report


def test_more_unreadable_images_than_allowed_end_the_run(tmp_path, tree):
    (tree / "val" / "cat" / "val_0000.JPEG").write_bytes(b"")
    with pytest.raises(
        PrepareError, match=r"1 images cannot be read, --max-bad allows 0; first: val/cat/val_0000\.JPEG"
    ):
        prepare_imagenet(tree, tmp_path / "out", options())
    assert not (tmp_path / "out" / "catalogue.json").exists()


def test_a_shard_of_bad_images_only_is_no_shard(tmp_path, tree):
    for path in (tree / "val").rglob("*.JPEG"):
        path.write_bytes(b"")
    (tree / "val" / "cat" / "good.jpg").write_bytes(picture(5))
    catalogue = prepare_imagenet(tree, tmp_path / "out", options(max_bad=7, shards={"train": 1, "validation": 8}))
    assert [shard.samples for shard in catalogue.splits["validation"].shards] == [1]


def test_large_images_are_shrunk_where_asked(tmp_path, tree):
    big, small = tree / "train" / "cat" / "train_0000.JPEG", tree / "train" / "cat" / "train_0003.JPEG"
    big.write_bytes(picture(1, size=64))
    catalogue = prepare_imagenet(tree, tmp_path / "out", options(max_side=32, shards={"train": 1, "validation": 1}))
    assert catalogue.max_side == 32
    images = {sample["__key__"]: sample["jpg"] for sample in read_with_webdataset(tmp_path / "out", "*train*.tar")}
    assert images["train_0003"] == small.read_bytes()
    from restrike.data.decode import decode_rgb

    assert decode_rgb(images["train_0000"]).shape == (32, 32, 3)


def test_there_are_never_more_shards_than_images(tmp_path, tree):
    catalogue = prepare_imagenet(tree, tmp_path / "out", options(shards={"train": 1024, "validation": 64}))
    assert [len(split.shards) for split in catalogue.splits.values()] == [20, 7]


def test_keys_are_unique_and_without_dots():
    assert make_keys(["a/x.jpg", "a/y.1.jpg", "b/x.jpg", "b/\u00e9 z.png"]) == [
        "x-00000000",
        "y_1",
        "x-00000002",
        "__z",
    ]
    tricky = make_keys(["a/x.jpg", "b/x.jpg", "c/x-00000000.jpg"])
    assert len(set(tricky)) == 3


def test_another_set_in_the_folder_is_refused(tmp_path, tree):
    write_set(tmp_path / "out", shards=(4, 2))
    with pytest.raises(PrepareError, match="holds shards of another set or another number of shards"):
        prepare_imagenet(tree, tmp_path / "out", options())


def test_a_second_preparation_at_the_same_time_is_refused(tmp_path, tree):
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    with (
        pack_module.only_one(tmp_path / "out"),
        pytest.raises(PrepareError, match="another preparation is writing"),
    ):
        prepare_imagenet(tree, tmp_path / "out", options())


def test_too_little_space_is_told_before_the_work(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda path: type("", (), {"free": 1000})())
    with pytest.raises(PrepareError, match=r"GB free, about .* GB are needed"):
        prepare_imagenet(tree, tmp_path / "out", options())


def test_a_disk_that_fills_up_is_told_and_finished_shards_stay(tmp_path, tree, monkeypatch):
    def full(job):
        if job.target.name == "toy-train-0001.tar":
            monkeypatch.setattr("os.fsync", no_space)
        return write_shard(job)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack_module, "write_shard", full)
    with pytest.raises(PrepareError, match=r"no space left in .* while writing toy-train-0001\.tar; make room"):
        prepare_imagenet(tree, tmp_path / "out", options())
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar*")) == ["toy-train-0000.tar"]
    prepare_imagenet(tree, tmp_path / "out", options())
    prepare_imagenet(tree, tmp_path / "unbroken", options())
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")


def test_records_hold_no_path_of_this_machine(tmp_path, tree):
    prepare_imagenet(tree, tmp_path / "out", options())
    for path in [*(tmp_path / "out").rglob("*.json"), *(tmp_path / "out").glob("*.tar")]:
        assert str(tmp_path).encode() not in path.read_bytes()
    json.loads((tmp_path / "out" / "catalogue.json").read_text())
