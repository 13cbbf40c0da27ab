import hashlib
import io
import random
import zipfile
from pathlib import Path

import pytest
import torch

from restrike.checkpoints import atomic
from restrike.checkpoints.manifest import PIECE, DamagedCheckpointError, TreeDigest, pack, read_manifest, verify_stream


def archive() -> bytes:
    stream = io.BytesIO()
    torch.save({"weights": torch.arange(1000.0)}, stream)
    return stream.getvalue()


@pytest.mark.parametrize("seed", range(5))
def test_the_digest_does_not_depend_on_how_the_bytes_come(seed: int) -> None:
    data = random.Random(0).randbytes(2 * PIECE + 12345)
    pieces = [hashlib.sha256(data[start : start + PIECE]).digest() for start in range(0, len(data), PIECE)]
    lengths, digest, start = random.Random(seed), TreeDigest(), 0
    while start < len(data):
        length = lengths.choice([1, 1000, 70_000, PIECE - 1, PIECE, 2 * PIECE])
        digest.update(memoryview(data)[start : start + length])  # does not wait for what came before
        start += length
    digest.close()
    assert digest.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_a_file_with_the_older_manifest_is_checked_by_it() -> None:
    whole = archive()
    old = whole[:-2] + pack(hashlib.sha256(whole).hexdigest(), version=1)
    verify_stream(io.BytesIO(old), "old.ckpt")
    place = old.index(torch.arange(1000.0)[10:20].numpy().tobytes())
    damaged = old[:place] + b"?" + old[place + 1 :]
    with pytest.raises(DamagedCheckpointError, match=r"old\.ckpt"):
        verify_stream(io.BytesIO(damaged), "old.ckpt")


def test_a_manifest_of_an_unknown_version_is_no_proof() -> None:
    whole = archive()
    later = whole[:-2] + pack(hashlib.sha256(whole).hexdigest(), version=3)
    with pytest.raises(DamagedCheckpointError):
        verify_stream(io.BytesIO(later), "later.ckpt")


def test_every_piece_of_a_large_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "large.ckpt"
    atomic.save({"weights": torch.zeros(3 * PIECE // 4)}, path)
    content = bytearray(path.read_bytes())
    verify_stream(io.BytesIO(content), "large.ckpt")
    for place in range(PIECE // 2, len(content), PIECE):
        content[place] ^= 1
        with pytest.raises(DamagedCheckpointError):
            verify_stream(io.BytesIO(content), "large.ckpt")
        content[place] ^= 1


@pytest.mark.parametrize("with_crc32", [True, False])
def test_the_archives_own_checksums_are_written_where_they_are_wanted(tmp_path: Path, with_crc32: bool) -> None:
    path, content = tmp_path / "last.ckpt", {"weights": torch.arange(1000.0)}
    atomic.save(content, path, with_crc32=with_crc32)
    with path.open("rb") as stream:
        assert read_manifest(stream) is not None
    with zipfile.ZipFile(path) as stream:
        assert (stream.testzip() is None) == with_crc32
    assert torch.equal(torch.load(path, weights_only=True)["weights"], content["weights"])
    assert torch.serialization.get_crc32_options()


def test_a_save_that_fails_leaves_torchs_own_saves_as_they_were(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle|lambda"):
        atomic.save({"bad": lambda: None}, tmp_path / "last.ckpt")
    assert torch.serialization.get_crc32_options() and not list(tmp_path.iterdir())
