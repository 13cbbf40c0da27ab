"""Multi-view sets over HTTP: the same frames as from disk, by whole shards or by byte ranges, checked and retried."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multiview_modules import batches_of, datamodule, same
from restrike.data.cache import ShardCache
from restrike.data.multiview_filter import SceneFilter
from restrike.data.multiview_index import SceneIndex
from restrike.data.multiview_source import Access, SceneSource, open_scenes
from restrike.data.opener import NoRangesError, Transfer, read_range
from restrike.data.ranges import Piece, coalesce, read_pieces
from restrike.data.source import BadSampleError
from shard_tools import serve

FAST = Transfer(attempts=3, timeout_s=5.0, backoff_s=0.001)
VIEWS = np.array([5, 2, 5])


def opened(data: str, folder: Path, access: Access) -> SceneSource:
    return open_scenes(data, ShardCache(folder, transfer=FAST), SceneFilter(min_quality=None), access)


def whole_shards(server: Any) -> list[str]:
    """Paths of the tars that were asked for without a range."""
    return [path for path, headers in server.requests if path.endswith(".tar") and "Range" not in headers]


def equal(one: SceneSource, two: SceneSource, scene: int) -> bool:
    pairs = zip(one.read(scene, VIEWS), two.read(scene, VIEWS), strict=True)
    return all(np.array_equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("access", ["cache", "range"])
def test_remote_frames_equal_those_on_disk(toy_set: Path, tmp_path: Path, access: Access) -> None:
    local = opened(str(toy_set), tmp_path, "cache")
    with serve(toy_set) as server:
        remote = opened(server.url, tmp_path, access)
        assert len(remote) == len(local) == 16 and remote.fingerprint == local.fingerprint
        assert all(equal(local, remote, scene) for scene in (0, 7, 15))
        assert len(whole_shards(server)) == (3 if access == "cache" else 0)
    assert bool(list(tmp_path.glob("*.tar"))) == (access == "cache")


def test_only_the_drawn_frames_travel_and_neighbours_share_a_request(toy_set: Path, tmp_path: Path) -> None:
    with serve(toy_set) as server:
        source = opened(server.url, tmp_path, "range")
        server.requests.clear()
        source.read(0, np.array([2, 3, 3]))
    index = SceneIndex.load(toy_set / "co3d-apple-0000.idx")
    first, last = int(index.offsets[2, 0]), int(index.offsets[3, 2] + index.lengths[3, 2])
    assert [headers["Range"] for _, headers in server.requests] == [f"bytes={first}-{last - 1}"]
    assert source.will_read(np.array([0])) == []


@pytest.mark.parametrize("family", ["diffusionsfm", "cut3r", "vggt"])
@pytest.mark.parametrize("access", ["cache", "range"])
def test_training_batches_are_the_same_from_a_url(toy_set: Path, tmp_path: Path, family: str, access: str) -> None:
    with serve(toy_set) as server:
        remote = batches_of(datamodule(family, server.url, cache_dir=str(tmp_path), access=access), 3)
    local = batches_of(datamodule(family, toy_set), 3)
    assert all(same(a, b) for a, b in zip(remote, local, strict=True))


def test_workers_read_ranges_and_validation_is_complete(toy_set: Path, tmp_path: Path) -> None:
    with serve(toy_set) as server:
        options: dict[str, Any] = {"cache_dir": str(tmp_path), "access": "range", "num_workers": 2}
        module = datamodule("diffusionsfm", server.url, **options)
        module.setup("validate")
        loader = module.val_dataloader()
        batches: list[Any] = list(loader)
        loader.close()
        assert not whole_shards(server)
    assert sum(int(batch.valid.sum()) for batch in batches) == 4


def test_a_server_without_ranges_is_told_and_its_shards_are_cached(
    toy_set: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_ranges(handler: Any) -> bool:
        del handler.headers["Range"]
        handler.send_file()
        return True

    with serve(toy_set, no_ranges) as server, caplog.at_level(logging.WARNING):
        source = opened(server.url, tmp_path, "range")
        assert equal(opened(str(toy_set), tmp_path, "cache"), source, 3)
        with pytest.raises(NoRangesError, match="answers a Range request with status 200"):
            read_range(f"{server.url}/co3d-cup-0000.tar", 0, 1, FAST)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "data.access: range" in told and "cached instead" in told
    assert source.access == "cache" and list(tmp_path.glob("*.tar"))


def test_damage_on_the_way_is_found_by_the_crc_and_fetched_again(toy_set: Path, tmp_path: Path) -> None:
    def flip(times: int) -> Any:
        def behave(handler: Any) -> bool:
            damaged = [path for path, headers in handler.server.requests if "Range" in headers]
            if "Range" not in handler.headers or not 2 <= len(damaged) <= 1 + times:  # the first asks whether it can
                return False
            start, _, end = handler.headers["Range"].removeprefix("bytes=").partition("-")
            data = Path(handler.translate_path(handler.path)).read_bytes()
            part = bytearray(data[int(start) : int(end) + 1])
            part[len(part) // 2] ^= 1
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
            handler.send_header("Content-Length", str(len(part)))
            handler.end_headers()
            handler.wfile.write(part)
            return True

        return behave

    local = opened(str(toy_set), tmp_path, "cache").read(0, np.array([1]))
    with serve(toy_set, flip(1)) as server:
        (view,) = opened(server.url, tmp_path, "range").read(0, np.array([1]))
    assert np.array_equal(view.image, local[0].image)
    with serve(toy_set, flip(99)) as server, pytest.raises(BadSampleError, match=r"CRC differs.*tried 3 times"):
        opened(server.url, tmp_path, "range").read(0, np.array([1]))


def test_a_shard_that_was_replaced_is_named(toy_set: Path) -> None:
    tar = toy_set / "co3d-cup-0000.tar"
    with (
        serve(toy_set) as server,
        pytest.raises(OSError, match=r"co3d-cup-0000\.tar: has \d+ bytes, its catalogue says 7"),
    ):
        read_range(f"{server.url}/{tar.name}", 0, 1, FAST, expected_bytes=7)


def test_ranges_of_a_pipe_are_refused() -> None:
    with pytest.raises(ValueError, match="byte ranges are read over"):
        read_range("pipe:cat x", 0, 1, FAST)


def test_pieces_are_joined_over_small_gaps_only_and_come_in_the_order_asked(toy_set: Path) -> None:
    a, b, c = Piece(0, 10, 0), Piece(12, 20, 0), Piece(40, 50, 0)
    assert coalesce([c, a, b, a], max_gap=2) == [[a, b], [c]]
    assert coalesce([b, a], max_gap=1) == [[a], [b]]
    index = SceneIndex.load(toy_set / "co3d-cup-0000.idx")
    begin, end = index.offsets[:, 0], index.offsets[:, 2] + index.lengths[:, 2]
    pieces = [Piece(int(begin[k]), int(end[k]), int(index.frame_crc32[k])) for k in (6, 0, 6)]
    data = (toy_set / "co3d-cup-0000.tar").read_bytes()
    with serve(toy_set) as server:
        found = read_pieces(f"{server.url}/co3d-cup-0000.tar", pieces, FAST)
    assert found == [data[piece.begin : piece.end] for piece in pieces]


def test_the_same_ranges_come_from_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    class Bucket:
        def cat_file(self, location: str, start: int, end: int) -> bytes:
            assert location == "s3://bucket/x.tar"
            return bytes(range(100))[start:end]

    monkeypatch.setitem(sys.modules, "fsspec", types.SimpleNamespace(filesystem=lambda protocol: Bucket()))
    assert read_range("s3://bucket/x.tar", 3, 6, FAST) == bytes([3, 4, 5])
    with pytest.raises(OSError, match="truncated: 1 of 2 bytes"):
        read_range("s3://bucket/x.tar", 99, 101, FAST)
