"""The tar reader agrees with the standard library's, and refuses what could do harm."""

from __future__ import annotations

import io
import mmap
import tarfile

import pytest

from restrike.data.tar import TarError, iter_members, stream_members

FILES = {"a.jpg": b"x" * 700, "a.cls": b"3", "deep/er/b.jpg": b"", "c.json": b"{}" * 256, "d.jpg": b"y" * 512}
LONG = {**FILES, f"{'very/' * 40}long-\u00e9{'-' * 120}.jpg": b"z" * 3}


def make_tar(files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_special(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)
    return buffer.getvalue()


def read(data: bytes) -> dict[str, bytes]:
    return {m.name: data[m.offset : m.offset + m.size] for m in iter_members(io.BytesIO(data), "t.tar")}


class OneWay(io.RawIOBase):
    """A stream that cannot seek and gives at most 100 bytes a read, like a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, 100))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_library(format):
    files = FILES if format == tarfile.USTAR_FORMAT else LONG
    data = make_tar(files, format)
    assert read(data) == files
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [m.offset_data for m in tar] == [m.offset for m in iter_members(io.BytesIO(data), "t.tar")]


def test_a_memory_map_reads_like_a_file(tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(make_tar(FILES))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert [member.name for member in iter_members(mapped, "t.tar")] == list(FILES)


def test_a_stream_that_cannot_seek_is_read_in_one_pass():
    class Full(OneWay):
        def read(self, size: int = -1) -> bytes:
            return self._data.read(size)

    assert dict(stream_members(Full(make_tar(LONG, tarfile.PAX_FORMAT)), "t.tar")) == LONG


def test_members_begin_where_the_one_before_ends():
    members = list(iter_members(io.BytesIO(make_tar(LONG, tarfile.PAX_FORMAT)), "t.tar"))
    ends = [-(-(m.offset + m.size) // 512) * 512 for m in members]
    assert [m.start for m in members] == [0, *ends[:-1]]  # extended headers belong to their member


def test_sizes_in_base_256_are_read():
    header = bytearray(make_tar({"big.jpg": b""})[:512])
    size = 9 << 30
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(TarError, match=f"'big.jpg' needs {size} bytes"):
        list(iter_members(io.BytesIO(bytes(header)), "t.tar"))


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg", "a\\..\\evil.jpg"])
def test_names_that_point_outside_are_refused(name):
    with pytest.raises(TarError, match="points outside the shard; refused"):
        read(make_special(name))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S"])
def test_links_and_devices_are_refused(kind):
    with pytest.raises(TarError, match="plain files only"):
        read(make_special("evil.jpg", kind, "/etc/passwd"))


@pytest.mark.parametrize("name", ["a.pkl", "a.pyd", "a.pth", "a.PICKLE", "a.pyd.gz", "x/a.left.pt"])
def test_members_that_would_be_unpickled_are_refused(name):
    with pytest.raises(TarError, match="would be unpickled"):
        read(make_special(name))


def test_a_harmful_name_in_a_pax_header_is_refused():
    with pytest.raises(TarError, match="points outside"):
        read(make_tar({f"../{'x' * 200}.jpg": b"1"}, tarfile.PAX_FORMAT))


def test_every_truncation_is_an_error_also_between_members():
    data = make_tar({"a.jpg": b"x" * 700, "b.jpg": b"y" * 600})
    for length in range(0, 3073):
        with pytest.raises(TarError, match=r"t\.tar: truncated"):
            read(data[:length])
    assert len(read(data[: 3072 + 512])) == 2


def test_a_flipped_header_byte_is_noticed():
    data = bytearray(make_tar(FILES))
    data[3] ^= 1
    with pytest.raises(TarError, match="damaged tar header at byte 0"):
        read(bytes(data))


def test_a_stream_that_breaks_off_is_an_error():
    with pytest.raises(TarError, match=r"truncated in 'a\.jpg': 488 of 700 bytes"):
        list(stream_members(io.BytesIO(make_tar(FILES)[:1000]), "t.tar"))
