"""Shards that are damaged, missing, hostile or out of reach: an error that names them, never other pixels."""

import dataclasses
import io
import multiprocessing
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.cases import case
from restrike.data.cache import ShardCache
from restrike.data.dataset import DatasetLocation, open_split
from restrike.data.index import ShardIndex, build_index
from restrike.data.opener import FetchError, Transfer
from restrike.data.source import BadSampleError, ImageSource
from restrike.data.tar import TarError
from shard_tools import picture, serve, write_set

FAST = Transfer(attempts=2, timeout_s=5.0, backoff_s=0.001)
SHARD = "toy-train-0001.tar"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A prepared set of three training shards."""
    write_set(tmp_path / "set")
    return tmp_path / "set"


def open_train(data: Path | str, folder: Path) -> ImageSource:
    return open_split(DatasetLocation(str(data), "auto", 3, {}), "train", ShardCache(folder / "cache", transfer=FAST))


def swap_index(folder: Path, bytes_more: int) -> None:
    """Put another shard's index beside `SHARD`, for a tar that is longer by `bytes_more`."""
    other = ShardIndex.load(folder / "toy-train-0002.idx")
    size = (folder / SHARD).stat().st_size + bytes_more
    dataclasses.replace(other, tar_bytes=size).save((folder / SHARD).with_suffix(".idx"))


def cut(path: Path, left: int) -> None:
    path.write_bytes(path.read_bytes()[:left])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda f: (f / SHARD).unlink(), rf"{SHARD} is missing"),
    "a shard is truncated": (lambda f: cut(f / SHARD, 3000), rf"{SHARD} has 3000 bytes, its catalogue says"),
    "a shard is empty": (lambda f: cut(f / SHARD, 0), rf"{SHARD} has 0 bytes"),
    "an index is missing": (lambda f: (f / SHARD).with_suffix(".idx").unlink(), r"toy-train-0001\.idx is missing"),
    "an index is truncated": (lambda f: cut((f / SHARD).with_suffix(".idx"), 100), r"0001\.idx is not the one"),
    "the index is of a longer shard": (lambda f: swap_index(f, 512), r"0001\.idx is not the one that the catalogue"),
    "the catalogue is truncated": (lambda f: cut(f / "catalogue.json", 200), "is not a shard catalogue"),
    "the catalogue is missing": (lambda f: (f / "catalogue.json").unlink(), "has not finished"),
}


@case("shard", "{damage}", promise="refused by name before training starts, with the mend")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_set(damage: str, toy: Path, tmp_path: Path) -> None:
    break_it, message = DAMAGE[damage]
    break_it(toy)
    with pytest.raises(ValueError, match=message):
        open_train(toy, tmp_path)


@case("shard", "the index is of another shard as long", promise="refused by name before training starts")
def test_the_index_of_another_shard_of_equal_length(toy: Path, tmp_path: Path) -> None:
    swap_index(toy, 0)
    with pytest.raises(ValueError, match=r"toy-train-0001"):
        open_train(toy, tmp_path)


@case("shard", "a shard shrinks or vanishes during the run", promise="its samples are bad, by name; others still load")
def test_a_shard_that_vanishes_later(toy: Path, tmp_path: Path) -> None:
    source = open_train(toy, tmp_path)
    cut(toy / "toy-train-0000.tar", 0)
    with pytest.raises(BadSampleError, match="truncated"):
        source.read(0)
    assert source.place(0).endswith("toy-train-0000.tar")
    assert source.read(len(source) - 1)


def write_member(path: Path, name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> Path:
    """A foreign shard of one good sample and one member more."""
    image = picture(1)
    with tarfile.open(path, "w") as tar:
        for info, data in ((tarfile.TarInfo("a.jpg"), image), (tarfile.TarInfo(name), b"")):
            info.size = len(data)
            if not data:
                info.type, info.linkname = kind, target
            tar.addfile(info, io.BytesIO(data))
    return path


HOSTILE: dict[str, tuple[tuple[Any, ...], str]] = {
    "a name with ../": (("../evil.jpg",), "points outside"),
    "an absolute name": (("/etc/evil.jpg",), "points outside"),
    "a symbolic link": (("b.jpg", tarfile.SYMTYPE, "/etc/passwd"), "plain files only"),
    "a hard link": (("b.jpg", tarfile.LNKTYPE, "/etc/passwd"), "plain files only"),
    "a device": (("b.jpg", tarfile.CHRTYPE), "plain files only"),
    "a pickle": (("b.pkl",), "would be unpickled"),
    "a tensor file": (("b.pth",), "would be unpickled"),
}


@case("shard", "a member is {member}", promise="the shard is refused; nothing is followed, written or unpickled")
@pytest.mark.parametrize("member", HOSTILE)
def test_a_hostile_member(member: str, tmp_path: Path) -> None:
    arguments, message = HOSTILE[member]
    with pytest.raises(TarError, match=rf"x\.tar.*{message}"):
        build_index(write_member(tmp_path / "x.tar", *arguments))


@case("shard", "one bit flips in a tar header", promise="found by its checksum, with the place")
def test_a_flipped_header_bit(tmp_path: Path) -> None:
    path = write_member(tmp_path / "x.tar", "b.txt")
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(TarError, match="damaged tar header at byte 0"):
        build_index(path)


@case("shard", "an index with a pickle in it", promise="refused by name; nothing is unpickled")
def test_a_pickled_index(tmp_path: Path) -> None:
    import numpy as np

    with open(tmp_path / "x.idx", "wb") as file:
        np.savez(file, version=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(ValueError, match=r"x\.idx is damaged"):
        ShardIndex.load(tmp_path / "x.idx")


def send_short(handler: Any) -> bool:
    del handler.headers["Range"]
    handler.send_file(announce_extra=50)
    return True


def send_404(handler: Any) -> bool:
    handler.send_error(404)
    return True


def send_503(handler: Any) -> bool:
    handler.send_error(503)
    return True


SERVERS: dict[str, tuple[Callable[[Any], bool], tuple[int | None, str | None], str]] = {
    "HTTP 404": (send_404, (None, None), "HTTP 404"),
    "HTTP 503 every time": (send_503, (None, None), "HTTP 503 .*tried 2 times"),
    "a body that is shorter than announced": (send_short, (None, None), "truncated: the server announced"),
    "another length than the catalogue's": (lambda handler: False, (7, None), "expected 7 bytes"),
    "another hash than the catalogue's": (lambda handler: False, (None, "0" * 64), "expected sha256"),
}


@case("shard", "the server answers with {answer}", promise="an error that names the URL; nothing stays in the cache")
@pytest.mark.parametrize("answer", SERVERS)
def test_a_bad_answer(answer: str, toy: Path, tmp_path: Path) -> None:
    behave, expected, message = SERVERS[answer]
    cache = ShardCache(tmp_path / "cache", transfer=FAST)
    with serve(toy, behave) as server, pytest.raises(FetchError, match=rf"{SHARD}: .*{message}"):
        cache.path(f"{server.url}/{SHARD}", *expected)
    assert {path.suffix for path in cache.folder.iterdir()} == {".lock"}


@case("shard", "the server refuses connections", promise="tried again, then an error that names the option and URL")
def test_a_refused_connection(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ValueError, match=r"data\.data: .*no connection .*tried 2 times"):
        open_train(f"http://127.0.0.1:{port}", tmp_path)


def read_all(cache: Path, url: str, names: list[str], results: Any) -> None:
    """Runs in a process of its own."""
    results.put([ShardCache(cache, transfer=FAST).path(f"{url}/{name}").read_bytes() for name in names])


@case("shard", "two processes fill one cache", promise="each file is fetched once and both read it whole")
def test_two_processes_fill_one_cache(toy: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in toy.glob("*.tar"))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with serve(toy) as server:
        arguments = (tmp_path / "cache", server.url, names, results)
        processes = [context.Process(target=read_all, args=arguments) for _ in range(2)]
        for process in processes:
            process.start()
        contents = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert sorted(path for path, _ in server.requests) == [f"/{name}" for name in names]
    assert contents == [[(toy / name).read_bytes() for name in names]] * 2
