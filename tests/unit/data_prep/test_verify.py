"""Verification finds any flipped byte and says where."""

from __future__ import annotations

import pytest

from restrike.data.index import ShardIndex
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.verify import verify
from shard_tools import JPEGS, write_set


@pytest.fixture
def toy(tmp_path):
    write_set(tmp_path)
    return tmp_path


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_a_whole_set_has_no_problems(toy):
    assert verify(toy, workers=2, decode=True) == []


def test_a_flipped_byte_anywhere_in_a_shard_is_found_and_its_sample_named(toy):
    shard, index = toy / "toy-train-0001.tar", ShardIndex.load(toy / "toy-train-0001.idx")
    for position in range(0, shard.stat().st_size, 997):
        flip(shard, position)
        sample = int((index.starts <= position).sum()) - 1
        where = f"in sample '{index.key(sample)}'" if sample < len(index) else "(behind the last sample)"
        assert verify(toy) == [f"toy-train-0001.tar: sha256 differs from the catalogue's {where}"]
        flip(shard, position)


def test_a_flipped_byte_in_an_index_or_in_the_catalogue_is_found(toy):
    flip(toy / "toy-train-0001.idx", 100)
    assert verify(toy) == ["toy-train-0001.idx: sha256 differs from the catalogue's"]
    flip(toy / "toy-train-0001.idx", 100)
    catalogue = (toy / "catalogue.json").read_bytes()
    flip(toy / "catalogue.json", catalogue.index(b'"seed": 0') + 8)
    assert len(verify(toy)) == 1
    assert "catalogue.json" in verify(toy)[0]


def test_missing_and_shortened_files_are_named(toy):
    (toy / "toy-train-0000.idx").unlink()
    shard = toy / "toy-validation-01.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    problems = verify(toy)
    assert problems[0] == "toy-train-0000.idx: missing"
    assert problems[1].startswith("toy-validation-01.tar: ")
    assert len(problems) == 2


def test_images_that_do_not_decode_are_found_on_demand(tmp_path):
    folder = tmp_path / "images" / "train" / "cat"
    folder.mkdir(parents=True)
    (folder / "bad.jpg").write_bytes((JPEGS / "corrupt_truncated_60pct.jpg").read_bytes())
    write_set(tmp_path, check_decode=False)
    assert verify(tmp_path) == []
    (problem,) = verify(tmp_path, decode=True)
    assert "sample 'bad' cannot be decoded" in problem


def test_a_folder_without_a_set_is_a_mistake(tmp_path):
    with pytest.raises(PrepareError, match=r"no catalogue\.json in"):
        verify(tmp_path)
