"""Sidecar indices: what they hold, that equal shards give equal bytes, and what is refused."""

from __future__ import annotations

import io
import tarfile
import zlib

import numpy as np
import pytest
from webdataset import TarWriter

from restrike.data.index import ShardIndex, build_index, split_key
from restrike.data.tar import TarError
from shard_tools import picture


def write_foreign(path, samples):
    """A shard as others make them: webdataset's writer with its defaults."""
    with TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def write_plain(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_an_index_finds_images_and_labels_of_a_foreign_shard(tmp_path):
    images = [picture(number) for number in range(3)]
    samples = [{"__key__": f"n0144/{i}", "jpg": images[i], "cls": 5 + i, "json": {"label": 5 + i}} for i in range(3)]
    path = write_foreign(tmp_path / "x.tar", samples)
    index, data = build_index(path), path.read_bytes()
    assert [index.key(row) for row in range(3)] == ["n0144/0", "n0144/1", "n0144/2"]
    assert index.labels.tolist() == [5, 6, 7]
    for row, image in enumerate(images):
        assert data[index.offsets[row] : index.offsets[row] + index.sizes[row]] == image
        assert zlib.crc32(data[index.starts[row] : index.starts[row + 1]]) == index.crc32[row]
    assert index.tar_bytes == len(data)


def test_the_label_may_come_from_json_or_be_absent(tmp_path):
    path = write_foreign(
        tmp_path / "x.tar",
        [{"__key__": "a", "png": picture(1), "json": {"label": 9}}, {"__key__": "b", "webp": picture(2)}],
    )
    assert build_index(path).labels.tolist() == [9, -1]


def test_saving_gives_equal_bytes_and_loads_back(tmp_path):
    path = write_foreign(tmp_path / "x.tar", [{"__key__": "a", "jpg": picture(1), "cls": 1}])
    index = build_index(path)
    index.save(tmp_path / "x.idx")
    loaded = ShardIndex.load(tmp_path / "x.idx")
    assert loaded.to_bytes() == index.to_bytes() == (tmp_path / "x.idx").read_bytes()
    assert loaded.tar_bytes == index.tar_bytes
    assert np.array_equal(loaded.keys, index.keys)


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"garbage"])
def test_a_damaged_index_is_named(tmp_path, damage):
    path = write_foreign(tmp_path / "x.tar", [{"__key__": "a", "jpg": picture(1), "cls": 1}])
    (tmp_path / "x.idx").write_bytes(damage(build_index(path).to_bytes()))
    with pytest.raises(ValueError, match=r"x\.idx is damaged"):
        ShardIndex.load(tmp_path / "x.idx")


def test_an_index_that_is_a_pickle_runs_no_code(tmp_path):
    np.save(tmp_path / "x.idx.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="is damaged"):
        ShardIndex.load(tmp_path / "x.idx.npy")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.cls", b"1")], "sample 'a' has no image"),
        ([("a.jpg", b"x"), ("a.cls", b"one")], "sample 'a' has an unreadable label"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1")], "sample 'a' are not adjacent"),
        ([("a.jpg", b"x"), ("a.json", b"[")], "unreadable label"),
        ([], "holds no member"),
    ],
)
def test_a_shard_that_cannot_be_used_says_why(tmp_path, files, message):
    with pytest.raises(TarError, match=message):
        build_index(write_plain(tmp_path / "x.tar", files))


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(TarError, match="empty file"):
        build_index(tmp_path / "x.tar")


def test_a_key_ends_at_the_first_dot_of_the_file_name():
    assert split_key("v1.0/a.b/c.seg.png") == ("v1.0/a.b/c", "seg.png")


def test_an_index_reads_as_numpy_reads_it(tmp_path):
    shard = write_plain(
        tmp_path / "x.tar", [("a/é.jpg", picture(1)), ("a/é.cls", b"3"), ("b.jpg", picture(1)), ("b.cls", b"0")]
    )
    path = tmp_path / "x.idx"
    build_index(shard).save(path)
    found = ShardIndex.load(path)
    with np.load(path) as arrays:
        assert set(arrays.files) == {"version", *vars(found)}
        for name, value in vars(found).items():
            assert np.array_equal(value, arrays[name]) and np.asarray(value).dtype.kind == arrays[name].dtype.kind


def test_every_flipped_byte_of_an_index_is_named_or_harmless(tmp_path):
    shard = write_plain(tmp_path / "x.tar", [("b.jpg", picture(1)), ("b.cls", b"0")])
    path = tmp_path / "x.idx"
    build_index(shard).save(path)
    whole, want = path.read_bytes(), ShardIndex.load(path)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            found = ShardIndex.load(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert all(np.array_equal(getattr(found, name), value) for name, value in vars(want).items())
