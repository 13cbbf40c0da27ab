"""Fetching: whole and checked, or an error that names the file and none of its secrets."""

from __future__ import annotations

import base64
import hashlib
import socket
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from restrike.data.opener import FetchError, Transfer, fetch, join, local_path, redact, scheme
from shard_tools import serve

FAST = Transfer(attempts=3, timeout_s=2.0, backoff_s=0.001)
DATA = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "x.tar").write_bytes(DATA)
    return tmp_path / "served"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def test_a_file_arrives_whole(folder, target):
    with serve(folder) as server:
        fetch(f"{server.url}/x.tar", target, FAST, len(DATA), SHA256)
    assert target.read_bytes() == DATA


def test_file_urls_and_plain_paths_are_local(folder, target):
    fetch(f"file://{folder}/x.tar", target, FAST, expected_sha256=SHA256)
    assert target.read_bytes() == DATA
    assert local_path("file:///a%20b/c") == local_path("/a b/c")


def test_a_missing_file_fails_at_once(folder, target):
    with serve(folder) as server, pytest.raises(FetchError, match=r"/nope\.tar: HTTP 404"):
        fetch(f"{server.url}/nope.tar", target, FAST)
    assert len(server.requests) == 1
    assert not target.exists()


def test_a_refused_connection_is_tried_again_and_named(target):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(FetchError, match=r"/x\.tar: no connection .*tried 3 times"):
        fetch(f"http://127.0.0.1:{port}/x.tar", target, FAST)


def test_a_server_error_is_tried_again(folder, target):
    def busy_twice(handler):
        if len(handler.server.requests) <= 2:
            handler.send_error(503)
            return True
        return False

    with serve(folder, busy_twice) as server:
        fetch(f"{server.url}/x.tar", target, FAST, len(DATA), SHA256)
    assert len(server.requests) == 3


def test_a_transfer_that_breaks_off_is_resumed_where_it_stopped(folder, target):
    def cut_once(handler):
        if len(handler.server.requests) == 1:
            handler.send_file(cut=100_000)
            return True
        return False

    with serve(folder, cut_once) as server:
        fetch(f"{server.url}/x.tar", target, FAST, len(DATA), SHA256)
    assert target.read_bytes() == DATA
    assert server.requests[1][1]["Range"] == "bytes=100000-"


def test_a_server_without_ranges_sends_the_whole_again(folder, target):
    def no_ranges(handler):
        del handler.headers["Range"]
        handler.send_file(cut=1000 if len(handler.server.requests) == 1 else None)
        return True

    with serve(folder, no_ranges) as server:
        fetch(f"{server.url}/x.tar", target, FAST, len(DATA), SHA256)
    assert target.read_bytes() == DATA


def test_a_file_that_is_always_truncated_is_an_error(folder, target):
    def truncated(handler):
        del handler.headers["Range"]
        handler.send_file(announce_extra=50)
        return True

    with serve(folder, truncated) as server, pytest.raises(FetchError, match="truncated: the server announced"):
        fetch(f"{server.url}/x.tar", target, FAST)
    assert not target.exists()


@pytest.mark.parametrize(
    ("expected_bytes", "sha256", "message"),
    [(len(DATA) + 1, None, "expected 300001 bytes, got 300000"), (None, "0" * 64, "expected sha256 0000")],
)
def test_another_length_or_hash_is_an_error(folder, target, expected_bytes, sha256, message):
    with serve(folder) as server, pytest.raises(FetchError, match=message):
        fetch(f"{server.url}/x.tar", target, FAST, expected_bytes, sha256)
    assert len(server.requests) == FAST.attempts
    assert not target.exists()


def test_damage_on_the_way_is_mended_by_fetching_again(folder, target):
    def flip_once(handler):
        if len(handler.server.requests) == 1:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(DATA)))
            handler.end_headers()
            handler.wfile.write(bytes([DATA[0] ^ 1]) + DATA[1:])
            return True
        return False

    with serve(folder, flip_once) as server:
        fetch(f"{server.url}/x.tar", target, FAST, len(DATA), SHA256)
    assert target.read_bytes() == DATA


def test_credentials_in_a_url_reach_the_server_but_no_message(folder, target):
    with serve(folder) as server:
        url = server.url.replace("http://", "http://me:s3cret@")
        fetch(f"{url}/x.tar?token=t0ken", target, FAST, len(DATA))
        sent = server.requests[0][1]["Authorization"]
        assert base64.b64decode(sent.removeprefix("Basic ")) == b"me:s3cret"
        with pytest.raises(FetchError) as caught:
            fetch(f"{url}/nope.tar?token=t0ken", target, FAST)
    assert "s3cret" not in str(caught.value)
    assert "t0ken" not in str(caught.value)
    assert "/nope.tar" in str(caught.value)


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://u:p@host:1/a/b.tar?X-Amz-Signature=1#f", "https://host:1/a/b.tar"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("pipe:curl -H 'Authorization: x' http://h/y", "pipe:curl …"),
        ("/plain/path", "/plain/path"),
    ],
)
def test_messages_show_neither_users_nor_queries_nor_commands(location, shown):
    assert redact(location) == shown


def test_a_pipe_runs_only_where_it_was_allowed(folder, target):
    command = f"pipe:cat {folder}/x.tar"
    with pytest.raises(ValueError, match=r"data\.allow_pipe=true"):
        fetch(command, target, FAST)
    fetch(command, target, Transfer(allow_pipe=True), len(DATA), SHA256)
    assert target.read_bytes() == DATA


def test_a_pipe_that_fails_tells_its_exit_status(target):
    with pytest.raises(FetchError, match="exit status 3: oh no"):
        fetch("pipe:echo oh no >&2; exit 3", target, Transfer(allow_pipe=True))
    assert not target.exists()


def test_s3_goes_through_fsspec(monkeypatch, folder, target):
    class Bucket:
        def get_file(self, location, path):
            assert location == "s3://bucket/x.tar"
            Path(path).write_bytes(DATA)

    fake = types.SimpleNamespace(filesystem=lambda protocol: Bucket() if protocol == "s3" else None)
    monkeypatch.setitem(sys.modules, "fsspec", fake)
    fetch("s3://bucket/x.tar", target, FAST, len(DATA), SHA256)
    assert target.read_bytes() == DATA


def test_s3_without_its_package_says_what_to_install(monkeypatch, target):
    def no_s3fs(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setitem(sys.modules, "fsspec", types.SimpleNamespace(filesystem=no_s3fs))
    with pytest.raises(FetchError, match=r"pip install 'restrike\[s3\]'"):
        fetch("s3://bucket/x.tar", target, FAST)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="unknown scheme 'gopher:'"):
        scheme("gopher://host/x.tar")


def test_a_name_joins_before_the_query():
    assert join("https://h/a/?sig=1", "x.tar") == "https://h/a/x.tar?sig=1"
    assert join("/a", "x.tar") == "/a/x.tar"
