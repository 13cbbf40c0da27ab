"""Loading: a damaged file is refused by name and the one before it is used."""

import io
import os
import zipfile
from pathlib import Path

import pytest
import torch

from callbacks.checkpoint_io import AtomicCheckpointIO
from cli.run_folder import resolve_checkpoint
from faults.cases import case
from restrike.checkpoints import CheckpointError, atomic, safe_load
from restrike.checkpoints.manifest import DamagedCheckpointError, read_manifest, verify, verify_stream

OLD, NEW = {"step": torch.tensor(1)}, {"step": torch.tensor(2), "weights": torch.arange(1000.0)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """`last.ckpt` with NEW in it, and OLD kept before it."""
    path = tmp_path / "last.ckpt"
    atomic.save(OLD, path)
    atomic.save(NEW, path)
    return path


def assert_refused_and_passed_over(path: Path) -> None:
    with pytest.raises((DamagedCheckpointError, CheckpointError), match=r"last\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(path)
    passed_over: list[str] = []
    found = atomic.newest_valid(path.parent, "last*.ckpt", passed_over.append)
    assert found == atomic.previous_path(path)
    assert torch.load(found, weights_only=True) == OLD
    assert len(passed_over) == 1
    assert "last.ckpt" in passed_over[0]


LENGTHS = {"nothing left": 0.0, "a few bytes left": 0.01, "half left": 0.5, "most left": 0.97, "a byte gone": 1.0}


@case("load", "the newest file is truncated: {left}", promise="refused by name; the one before it is used")
@pytest.mark.parametrize("left", LENGTHS)
def test_a_truncated_file(left: str, saved: Path) -> None:
    os.truncate(saved, min(int(saved.stat().st_size * LENGTHS[left]), saved.stat().st_size - 1))
    assert_refused_and_passed_over(saved)


def place_of(part: str, path: Path) -> int:
    """Offset of a byte within a part of the archive."""
    content = path.read_bytes()
    if part == "a weight":
        return content.index(torch.arange(1000.0)[10:20].numpy().tobytes()) + 3
    if part == "the pickle":
        return content.index(b"weights")
    if part == "a record's header":
        return content.index(b"PK\x03\x04") + 30
    if part == "the directory":
        return content.rindex(b"PK\x01\x02") + 20
    if part == "the end record":
        return content.rindex(b"PK\x05\x06") + 1
    return content.rindex(b'"sha256": "') + 20  # the manifest


PARTS = ("a weight", "the pickle", "a record's header", "the directory", "the end record", "the manifest")


@case("load", "one bit flips in {part}", promise="refused by name; the one before it is used")
@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit(part: str, saved: Path) -> None:
    content, place = bytearray(saved.read_bytes()), place_of(part, saved)
    content[place] ^= 1
    stamp = saved.stat()
    saved.write_bytes(content)
    os.utime(saved, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert_refused_and_passed_over(saved)


@case("load", "a bit flips in a file that another program wrote", promise="found by the archive's own checksums")
def test_a_flipped_bit_in_a_file_without_manifest(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(NEW, path)
    verify(path)
    content = bytearray(path.read_bytes())
    content[place_of("a weight", path)] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="checksum of its record"):
        verify(path)


@case("load", "all files are damaged", promise="none is used, each is named")
def test_all_are_damaged(saved: Path) -> None:
    for file in saved.parent.iterdir():
        os.truncate(file, 100)
    passed_over: list[str] = []
    assert atomic.newest_valid(saved.parent, report=passed_over.append) is None
    assert ["last-previous.ckpt" in passed_over[1], "last.ckpt" in passed_over[0]] == [True, True]


@case("load", "a half-written file is the newest", promise="it is never taken for a checkpoint")
def test_a_temporary_file_is_never_taken(saved: Path) -> None:
    half = saved.with_name(f"{saved.name}.tmp-123")
    half.write_bytes(saved.read_bytes())
    assert atomic.newest_valid(saved.parent, "*") == saved


@case("load", "the folder is missing", promise="no checkpoint, no error")
def test_no_folder(tmp_path: Path) -> None:
    assert atomic.newest_valid(tmp_path / "none") is None


@case("load", "a folder bears the checkpoint's name", promise="passed over")
def test_a_folder_is_passed_over(saved: Path) -> None:
    (saved.parent / "zzz.ckpt").mkdir()
    assert atomic.newest_valid(saved.parent) == saved


NOT_CHECKPOINTS = {
    "an error page": b"<html>404 Not Found</html>",
    "a text file": b"epoch,loss\n1,2\n",
    "zeros": b"\0" * 4096,
    "another zip": b"",
}


@case("load", "the file is {content}", promise="refused by name, with what it is not")
@pytest.mark.parametrize("content", NOT_CHECKPOINTS)
def test_something_else_under_the_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(NOT_CHECKPOINTS[content])
    if content == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(path)


@case("load", "the file is missing", promise="an error that lists its neighbours")
def test_a_missing_file_names_its_neighbours(saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(saved.with_name("lost.ckpt"))


@case("load", "the file was copied or renamed", promise="its checksum goes with it")
def test_the_checksum_travels(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.ckpt"
    copy.write_bytes(saved.read_bytes())
    verify(copy)
    with copy.open("rb") as stream:
        assert read_manifest(stream) is not None
    assert torch.equal(safe_load(copy)["weights"], NEW["weights"])


@case("load", "the copy's dates are wrong", promise="among whole files the most recently written one is used")
def test_newest_is_by_time_of_writing(saved: Path) -> None:
    os.utime(saved, (1, 1))
    assert atomic.newest_valid(saved.parent) == atomic.previous_path(saved)


@case("load", "any one bit of the file flips, any number of bytes is lost", promise="found, for every bit and length")
def test_no_damage_goes_unseen(tmp_path: Path) -> None:
    atomic.save({"weights": torch.arange(20.0)}, tmp_path / "last.ckpt")
    content = (tmp_path / "last.ckpt").read_bytes()
    unseen = []
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        for damaged in (bytes(flipped), content[:place]):
            try:
                verify_stream(io.BytesIO(damaged), "last.ckpt")
                unseen.append((place, len(damaged)))
            except DamagedCheckpointError:
                pass
    assert unseen == []


@case("load", "the newest file of a run is damaged: {how}", promise="a warning; it goes on from the one before")
@pytest.mark.parametrize("how", ["--ckpt_path last", "--auto true"])
def test_a_run_goes_on_from_the_file_before(how: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    for content in (OLD, NEW):
        atomic.save(content, path)
    os.truncate(path, 500)
    value, auto = ("last", False) if "last" in how else (None, True)
    with pytest.warns(UserWarning, match=r"last\.ckpt.* is damaged"):
        found = resolve_checkpoint(value, str(tmp_path), auto, "fit")
    assert found == str(atomic.previous_path(path))
