"""Shard sets: the same images from a folder, local shards, http and pipes; foreign sets; sets that are not whole."""

from __future__ import annotations

import json
import re

import pytest
from webdataset import TarWriter

from restrike.data.cache import ShardCache
from restrike.data.catalogue import load_catalogue
from restrike.data.dataset import DatasetLocation, open_split
from restrike.data.opener import Transfer
from restrike.data.shards import expand_braces
from restrike.data.source import BadSampleError, ShardSource, class_counts, label_of
from shard_tools import picture, serve, write_set

FAST = Transfer(attempts=2, timeout_s=5.0, backoff_s=0.001, allow_pipe=True)


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", transfer=FAST)


@pytest.fixture
def toy(tmp_path):
    write_set(tmp_path / "set")
    return tmp_path / "set"


def location(data, format="auto", num_classes=3, **patterns):
    return DatasetLocation(str(data), format, num_classes, patterns)


def contents(source):
    return [(source.read(sample), label_of(source, sample)) for sample in range(len(source))]


def write_foreign(folder, split, numbers):
    folder.mkdir(exist_ok=True)
    with TarWriter(str(folder / f"imagenet1k-{split}.tar")) as writer:
        for number in numbers:
            writer.write({"__key__": f"n{number}", "jpg": picture(number), "cls": number % 3})
    return folder


def test_shards_hold_the_bytes_and_labels_of_the_folder(toy, cache):
    for split in ("train", "validation"):
        shards = open_split(location(toy), split, cache)
        folder = open_split(location(toy / "images"), split, cache)
        assert sorted(contents(shards)) == sorted(contents(folder))
        assert shards.class_names == folder.class_names == ["cat", "dog", "emu"]
        assert class_counts(shards) == class_counts(folder) == ([7, 7, 6] if split == "train" else [3, 2, 2])


def test_http_gives_what_the_disk_gives(toy, cache):
    local = open_split(location(toy), "train", cache)
    with serve(toy) as server:
        remote = open_split(location(server.url), "train", cache)
        assert isinstance(remote, ShardSource)
        assert not [path for path, _ in server.requests if path.endswith(".tar")]  # an index is enough to begin
        assert contents(remote) == contents(local)
    assert remote.fingerprint == local.fingerprint
    assert [remote.key(sample) for sample in range(20)] == [local.key(sample) for sample in range(20)]


def test_a_pipe_gives_what_the_disk_gives(toy, cache):
    local = open_split(location(toy), "train", cache)
    pattern = f"pipe:cat {toy}/toy-train-{{0000..0002}}.tar"
    piped = open_split(location(toy, train=pattern), "train", cache)
    assert contents(piped) == contents(local)


def test_a_foreign_set_is_indexed_on_first_use(tmp_path, cache):
    folder = write_foreign(tmp_path / "public", "train-0000", range(5))
    write_foreign(folder, "train-0001", range(5, 9))
    write_foreign(folder, "validation-00", range(3))
    source = open_split(location(folder), "train", cache)
    assert contents(source) == [(picture(number), number % 3) for number in range(9)]
    assert (folder / "imagenet1k-train-0001.idx").is_file()
    assert not list(folder.glob("*.lock"))
    (folder / "imagenet1k-train-0000.tar").touch()
    assert contents(open_split(location(folder), "train", cache)) == contents(source)
    assert len(open_split(location(folder), "validation", cache)) == 3


def test_a_foreign_set_over_http_needs_names_only(tmp_path, cache):
    folder = write_foreign(tmp_path / "public", "train-0000", range(5))
    write_foreign(folder, "train-0001", range(5, 9))
    with serve(folder) as server:
        source = open_split(location(server.url, train="imagenet1k-train-{0000..0001}.tar"), "train", cache)
        assert contents(source) == [(picture(number), number % 3) for number in range(9)]


def test_a_read_only_foreign_set_keeps_its_index_in_the_cache(tmp_path, cache, monkeypatch):
    folder = write_foreign(tmp_path / "public", "train-0000", range(5))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert len(open_split(location(folder), "train", cache)) == 5
    assert not list(folder.glob("*.idx"))
    assert len(list(cache.folder.glob("*.idx"))) == 1


def test_another_number_of_classes_is_refused(toy, cache):
    with pytest.raises(ValueError, match=r"data\.num_classes is 1000, but .* has 3 classes; set data\.num_classes=3"):
        open_split(location(toy, num_classes=1000), "train", cache)


def test_a_missing_shard_is_named(toy, cache):
    (toy / "toy-train-0001.tar").unlink()
    with pytest.raises(ValueError, match=r"shard .*toy-train-0001\.tar is missing; fetch or prepare"):
        open_split(location(toy), "train", cache)


def test_a_truncated_shard_is_named_before_anything_starts(toy, cache):
    shard = toy / "toy-train-0002.tar"
    shard.write_bytes(shard.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"toy-train-0002\.tar has \d+ bytes, its catalogue says \d+ \(truncated\?\)"):
        open_split(location(toy), "train", cache)


def test_a_truncated_foreign_shard_is_named(tmp_path, cache):
    folder = write_foreign(tmp_path / "public", "train-0000", range(5))
    shard = folder / "imagenet1k-train-0000.tar"
    open_split(location(folder), "train", cache)
    shard.write_bytes(shard.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"its index says \d+ \(truncated\?\)"):
        open_split(location(folder), "train", cache)
    (folder / "imagenet1k-train-0000.idx").unlink()
    with pytest.raises(ValueError, match=r"imagenet1k-train-0000\.tar: truncated"):
        open_split(location(folder), "train", cache)


def test_a_shard_that_shrinks_or_vanishes_later_makes_its_samples_bad(toy, cache):
    source = open_split(location(toy), "train", cache)
    (toy / "toy-train-0000.tar").write_bytes(b"")
    (toy / "toy-train-0001.tar").unlink()
    with pytest.raises(BadSampleError, match=r"truncated: 0 of \d+ bytes"):
        source.read(0)
    with pytest.raises(BadSampleError, match="cannot be opened"):
        source.read(int(source.shard_sizes[0]))
    assert source.read(len(source) - 1)


def test_an_unreachable_remote_shard_is_asked_for_once(toy, cache):
    with serve(toy) as server:
        source = open_split(location(server.url), "train", cache)
        (toy / "toy-train-0000.tar").unlink()
        for sample in (0, 1, 2):
            with pytest.raises(BadSampleError, match="HTTP 404"):
                source.read(sample)
        assert len([path for path, _ in server.requests if path.endswith("0000.tar")]) == 1


def test_an_edited_catalogue_is_refused(toy):
    path = toy / "catalogue.json"
    edited = json.loads(path.read_text())
    edited["classes"] = ["dog", "cat", "emu"]
    path.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="does not fit its checksum"):
        load_catalogue(path)


def test_a_catalogue_with_a_shard_elsewhere_is_refused(toy):
    path = toy / "catalogue.json"
    catalogue = load_catalogue(path)
    text = path.read_text().replace("toy-train-0000.tar", "../../secret.tar")
    path.write_text(text)
    with pytest.raises(ValueError):
        load_catalogue(path)
    forged = json.loads(text)
    forged["checksum"] = ""
    import msgspec

    resealed = msgspec.json.decode(json.dumps(forged), type=type(catalogue)).sealed()
    path.write_bytes(msgspec.json.encode(resealed))
    with pytest.raises(ValueError, match=re.escape("'../../secret.tar' is not a plain *.tar file name; refused")):
        load_catalogue(path)


def test_an_unfinished_preparation_is_not_taken_for_a_whole_set(toy, cache):
    (toy / "catalogue.json").unlink()
    with pytest.raises(ValueError, match="preparation of .* has not finished; run its"):
        open_split(location(toy), "train", cache)


def test_no_data_tells_how_to_make_some(tmp_path, cache):
    with pytest.raises(ValueError, match=r"data\.data: no images at .*prepare imagenet --src DIR --out .*nowhere"):
        open_split(location(tmp_path / "nowhere"), "train", cache)


def test_a_url_without_a_set_names_the_option(tmp_path, cache):
    with serve(tmp_path) as server, pytest.raises(ValueError, match=r"data\.data: .*/nope/catalogue\.json: HTTP 404"):
        open_split(location(f"{server.url}/nope"), "train", cache)


def test_a_split_that_is_not_there_is_named(toy, cache):
    with pytest.raises(ValueError, match="has no split 'test'; it has 'train', 'validation'"):
        open_split(location(toy), "test", cache)


def test_a_pattern_without_a_match_names_the_option(tmp_path, cache):
    folder = write_foreign(tmp_path / "public", "train-0000", range(5))
    with pytest.raises(ValueError, match=r"data\.val_shards: no shard matches '\*val\*\.tar'"):
        open_split(location(folder), "validation", cache)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x.tar", ["x.tar"]),
        ("x-{08..11}.tar", ["x-08.tar", "x-09.tar", "x-10.tar", "x-11.tar"]),
        ("{0..1}/x-{5..6}", ["0/x-5", "0/x-6", "1/x-5", "1/x-6"]),
    ],
)
def test_braces_expand(pattern, names):
    assert expand_braces(pattern) == names
