"""Own ustar/pax tar reader: headers only when the file can seek, or one sequential pass over a stream.

The standard library's `tarfile` spends ten times as long a member. Shards come from elsewhere, so a member that
points outside (absolute, `..`), is a link or a device, or would be unpickled by a tar-of-samples reader is refused:
data is never code.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_SKIPPED = (b"5", b"g")  # folders, global pax headers
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_PICKLED = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib", "dill"})
_MAX_LONG_NAME = 1 << 16


class TarError(ValueError):
    """A tar file is damaged, truncated or holds a member that is refused."""


class TarMember(NamedTuple):
    """A regular file in a tar: its content is `size` bytes at `offset`; its first header block is at `start`."""

    name: str
    offset: int
    size: int
    start: int


def iter_members(file: BinaryIO | mmap.mmap, label: str) -> Iterator[TarMember]:
    """Walk the headers of a seekable file or mmap; contents are skipped.

    Args:
        file: open for binary reading, at its beginning.
        label: what messages call the file.

    Raises:
        TarError: damaged header, truncated content, or a refused member (named).
    """
    file.seek(0, 2)
    end = file.tell()
    file.seek(0)
    for member in _headers(file, label):
        if member.offset + member.size > end:
            raise TarError(
                f"{label}: truncated: member '{member.name}' needs {member.size} bytes at {member.offset}, "
                f"the file ends at {end}; fetch or make this shard again"
            )
        yield member
        file.seek(_padded(member.offset + member.size))


def stream_members(file: BinaryIO, label: str) -> Iterator[tuple[str, bytes]]:
    """Read (name, content) in one pass over a stream that may not seek (a pipe, a socket)."""
    for member in _headers(file, label):
        yield member.name, _read_exactly(file, member.size, label, member.name)
        _read_exactly(file, _padded(member.size) - member.size, label, member.name)


def _headers(file: BinaryIO | mmap.mmap, label: str) -> Iterator[TarMember]:
    """Yield regular members; the caller moves the file past each one's content before the next is asked for."""
    position = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    start: int | None = None
    while True:
        header = file.read(BLOCK)
        if len(header) < BLOCK:  # also where the mark of the end is missing: a cut between members must not pass
            raise TarError(f"{label}: truncated: it ends at byte {position + len(header)} without the mark of its end")
        if header == bytes(BLOCK):
            if pax or long_name is not None:
                raise TarError(f"{label}: ends after an extended header at byte {position}")
            return
        size, kind = _check_header(header, label, position)
        start = position if start is None else start
        position += BLOCK
        if kind in (b"x", b"L"):
            if size > _MAX_LONG_NAME:
                raise TarError(f"{label}: extended header of {size} bytes at byte {position}")
            body = _read_exactly(file, _padded(size), label, "extended header")[:size]
            if kind == b"x":
                pax = _parse_pax(body, label, position)
            else:
                long_name = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
            position += _padded(size)
            continue
        name = pax.get("path", _name(header) if long_name is None else long_name)
        size = _number(pax["size"].encode(), label, position, base=10) if "size" in pax else size
        if kind in _REGULAR and not name.endswith("/"):
            _refuse(name, label)
            yield TarMember(name, position, size, start)
        elif kind not in _SKIPPED and not name.endswith("/"):
            what = _KINDS.get(kind, f"of type {kind!r}")
            raise TarError(f"{label}: member '{name}' is {what}; shards hold plain files only")
        position += _padded(size)
        long_name, pax, start = None, {}, None


def _check_header(header: bytes, label: str, position: int) -> tuple[int, bytes]:
    """Verify the checksum; return content size and type flag."""
    stored = _number(header[148:156], label, position)
    if stored != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise TarError(f"{label}: damaged tar header at byte {position} (checksum differs)")
    return _number(header[124:136], label, position), header[156:157]


def _number(field: bytes, label: str, position: int, base: int = 8) -> int:
    """Octal digits, or base 256 where the top bit is set (sizes of 8 GiB and more)."""
    if base == 8 and field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0")[0].strip()
    try:
        value = int(text or b"0", base)
    except ValueError:
        value = -1
    if value < 0:
        raise TarError(f"{label}: damaged tar header at byte {position}: {field!r} is not a number")
    return value


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _parse_pax(body: bytes, label: str, position: int) -> dict[str, str]:
    """Records "<length> <key>=<value>\\n", where length counts the whole record."""
    records: dict[str, str] = {}
    while body:
        digits, separator, _ = body.partition(b" ")
        length = int(digits) if separator and digits.isdigit() else 0
        key, separator, value = body[len(digits) + 1 : length - 1].partition(b"=")
        if not separator or length > len(body):
            raise TarError(f"{label}: damaged pax header at byte {position}")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        body = body[length:]
    return records


def _refuse(name: str, label: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if not name or name[0] in "/\\" or ".." in parts or "\0" in name:
        raise TarError(f"{label}: member '{name}' points outside the shard; refused")
    if not _PICKLED.isdisjoint(parts[-1].lower().split(".")[1:]):
        raise TarError(f"{label}: member '{name}' would be unpickled, which runs code; refused")


def _read_exactly(file: BinaryIO | mmap.mmap, size: int, label: str, name: str) -> bytes:
    data = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise TarError(f"{label}: truncated in '{name}': {len(data)} of {size} bytes")
        data += more
    return data


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
