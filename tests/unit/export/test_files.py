"""New files are whole or not there, and never in the place of others."""

from __future__ import annotations

import errno
import os

import pytest

from restrike.export import ExportError
from restrike.export.files import check_target, new_file, new_folder


def test_a_file_appears_with_what_lies_beside_it(tmp_path):
    target = tmp_path / "deep" / "er" / "model.onnx"
    with new_file(target) as temporary:
        temporary.write_text("graph")
        temporary.with_name("model.onnx.data").write_text("weights")
        assert not target.exists()
    assert sorted(os.listdir(target.parent)) == ["model.onnx", "model.onnx.data"]
    assert target.read_text() == "graph"


@pytest.mark.parametrize("place", [new_file, new_folder])
def test_a_failed_write_leaves_nothing(tmp_path, place):
    with pytest.raises(KeyError), place(tmp_path / "out") as temporary:
        (temporary / "part" if temporary.is_dir() else temporary).write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", [new_file, new_folder])
def test_a_full_disk_is_one_message(tmp_path, place):
    with pytest.raises(ExportError, match="out was not written: No space left"), place(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", [new_file, new_folder])
def test_what_is_there_stays(tmp_path, place):
    target = tmp_path / "out"
    target.write_text("mine")
    with pytest.raises(ExportError, match="never overwrites"), place(target):
        raise AssertionError("nothing may be computed for a target that is taken")
    assert target.read_text() == "mine"


@pytest.mark.parametrize("place", [new_file, new_folder])
def test_somebody_quicker_is_not_overwritten(tmp_path, place):
    target = tmp_path / "out"
    with pytest.raises(ExportError, match="never overwrites"), place(target) as temporary:
        (temporary / "part" if temporary.is_dir() else temporary).write_text("ours")
        target.write_text("theirs")
    assert target.read_text() == "theirs" and os.listdir(tmp_path) == ["out"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="file is no folder"):
        check_target(tmp_path / "file" / "model.onnx")
