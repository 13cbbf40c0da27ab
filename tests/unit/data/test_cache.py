"""The shard cache: one fetch for many processes, whole files only, bounded."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time

import pytest

from restrike.data.cache import ShardCache, locked
from restrike.data.opener import FetchError, Transfer
from shard_tools import serve

FAST = Transfer(attempts=2, timeout_s=5.0, backoff_s=0.001)


def fill(folder, count, size=1000):
    folder.mkdir()
    for number in range(count):
        (folder / f"x-{number}.tar").write_bytes(bytes([number]) * size)
    return folder


def fetch_all(cache_folder, url, count, results):
    """Runs in its own process."""
    cache = ShardCache(cache_folder, transfer=FAST)
    results.put([cache.path(f"{url}/x-{number}.tar").read_bytes() for number in range(count)])


def test_two_processes_that_fill_one_cache_fetch_each_file_once(tmp_path):
    served = fill(tmp_path / "served", 4)

    def slow(handler):
        time.sleep(0.05)  # so that both ask while the first transfer is under way
        return False

    context = multiprocessing.get_context("spawn")
    with serve(served, slow) as server:
        results = context.Queue()
        arguments = (tmp_path / "cache", server.url, 4, results)
        processes = [context.Process(target=fetch_all, args=arguments) for _ in range(2)]
        for process in processes:
            process.start()
        contents = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert sorted(path for path, _ in server.requests) == [f"/x-{number}.tar" for number in range(4)]
    assert contents == [[bytes([number]) * 1000 for number in range(4)]] * 2


def test_a_local_file_is_not_copied(tmp_path):
    served = fill(tmp_path / "served", 1)
    assert ShardCache(tmp_path / "cache").path(str(served / "x-0.tar")) == served / "x-0.tar"
    assert not (tmp_path / "cache").exists()


def test_the_least_recently_used_file_goes_first(tmp_path):
    with serve(fill(tmp_path / "served", 4)) as server:
        cache = ShardCache(tmp_path / "cache", max_bytes=2500, transfer=FAST)
        paths = [cache.path(f"{server.url}/x-{number}.tar") for number in range(2)]
        for age, path in zip((50, 100), paths, strict=True):
            os.utime(path, (time.time() - age, time.time() - age))
        cache.path(f"{server.url}/x-1.tar")  # used again: now the youngest
        third = cache.path(f"{server.url}/x-2.tar")
    assert not paths[0].exists()
    assert paths[1].exists()
    assert third.exists()


def test_a_file_larger_than_the_bound_can_still_be_read(tmp_path):
    with serve(fill(tmp_path / "served", 2)) as server:
        cache = ShardCache(tmp_path / "cache", max_bytes=10, transfer=FAST)
        for number in range(2):
            descriptor = cache.open(f"{server.url}/x-{number}.tar")
            assert os.pread(descriptor, 10, 0) == bytes([number]) * 10
            os.close(descriptor)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


def test_an_evicted_file_that_is_open_stays_readable(tmp_path):
    with serve(fill(tmp_path / "served", 2)) as server:
        cache = ShardCache(tmp_path / "cache", max_bytes=1500, transfer=FAST)
        descriptor = cache.open(f"{server.url}/x-0.tar")
        cache.path(f"{server.url}/x-1.tar")
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
        assert os.pread(descriptor, 3, 0) == b"\0\0\0"
        os.close(descriptor)


def test_what_a_killed_process_left_is_fetched_anew(tmp_path):
    with serve(fill(tmp_path / "served", 1)) as server:
        cache = ShardCache(tmp_path / "cache", transfer=FAST)
        path = cache.path(f"{server.url}/x-0.tar")
        path.rename(path.with_name(f"{path.name}.partial"))
        path.with_name(f"{path.name}.partial").write_bytes(b"half")
        assert cache.path(f"{server.url}/x-0.tar").read_bytes() == bytes(1000)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_failed_fetch_leaves_nothing(tmp_path):
    with serve(fill(tmp_path / "served", 1)) as server:
        cache = ShardCache(tmp_path / "cache", transfer=FAST)
        with pytest.raises(FetchError, match="expected sha256"):
            cache.path(f"{server.url}/x-0.tar", 1000, hashlib.sha256(b"other").hexdigest())
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_new_signature_in_the_url_finds_the_same_file(tmp_path):
    digest = hashlib.sha256(bytes(1000)).hexdigest()
    with serve(fill(tmp_path / "served", 1)) as server:
        cache = ShardCache(tmp_path / "cache", transfer=FAST)
        first = cache.path(f"{server.url}/x-0.tar?sig=monday", 1000, digest)
        assert cache.path(f"{server.url}/x-0.tar?sig=tuesday", 1000, digest) == first
        assert len(server.requests) == 1


def test_a_lock_excludes_a_second_holder_in_the_same_process(tmp_path, monkeypatch):
    monkeypatch.setattr("restrike.data.cache._LOCK_TIMEOUT_S", 0.05)
    with locked(tmp_path / "lock", "x"), pytest.raises(FetchError, match="another process has held"):
        with locked(tmp_path / "lock", "x"):
            pass
    with locked(tmp_path / "lock", "x"):
        pass
