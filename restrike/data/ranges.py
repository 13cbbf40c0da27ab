"""Parts of remote files without the whole: neighbouring parts in one request, requests in parallel, every part checked.

A multi-view run draws a few frames of a shard of a gigabyte. Where each shard is visited once or seldom (one pass of a
large set, evaluation, a node with a small disk), fetching the frames alone moves a tenth of the bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from restrike.data.opener import Transfer, read_range

_MAX_GAP = 1 << 16  # bytes that are cheaper to read over than to ask again behind
_THREADS = 8


class Piece(NamedTuple):
    """Bytes [begin, end) of a file and their CRC-32."""

    begin: int
    end: int
    crc32: int


def coalesce(pieces: Sequence[Piece], max_gap: int = _MAX_GAP) -> list[list[Piece]]:
    """Distinct pieces in file order, in groups that one request each covers: no gap in a group exceeds `max_gap`."""
    groups: list[list[Piece]] = []
    for piece in sorted(set(pieces)):
        if groups and piece.begin - groups[-1][-1].end <= max_gap:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def read_pieces(
    location: str, pieces: Sequence[Piece], transfer: Transfer, expected_bytes: int | None = None
) -> list[bytes]:
    """Parts of one remote file, in the order asked for.

    Raises:
        FetchError, ValueError: as `read_range`; a part whose CRC differs is damage, and tried again.
    """

    def read(group: list[Piece]) -> dict[Piece, bytes]:
        first, last = group[0].begin, max(piece.end for piece in group)
        data = read_range(location, first, last, transfer, expected_bytes, lambda data: _problem(group, data))
        return {piece: data[piece.begin - first : piece.end - first] for piece in group}

    groups = coalesce(pieces)
    found: dict[Piece, bytes] = {}
    with ThreadPoolExecutor(min(_THREADS, len(groups))) as pool:
        for part in pool.map(read, groups):
            found |= part
    return [found[piece] for piece in pieces]


def _problem(group: list[Piece], data: bytes) -> str:
    for piece in group:
        if zlib.crc32(data[piece.begin - group[0].begin : piece.end - group[0].begin]) != piece.crc32:
            return f"bytes {piece.begin} to {piece.end} are not those that were packed (CRC differs)"
    return ""
