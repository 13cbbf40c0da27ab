"""One idle TCP connection from every rank to rank 0, over which a lost rank is noticed and named.

The kernel closes the connections of a process that dies, whatever killed it; keepalive finds a machine that is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

CONNECT_TIMEOUT_S = 10.0
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, seconds, probes: lost after 25 s
_LONGEST_LINE = 4096  # bytes
_open: set[socket.socket] = set()


def _close_in_child() -> None:
    """A forked loader worker must not keep the connection of its dead parent open."""
    for each in _open:
        each.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class Address(NamedTuple):
    """Where rank 0 listens, and what a rank must say to be believed."""

    port: int
    token: str


class Member(NamedTuple):
    """A process of the job."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


GONE = "is gone (killed, out of memory, or its machine was lost)"


class _Line:
    """JSON messages over one socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.peer: Member | None = None  # who it is, once it has said so
        self._rest = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        _open.add(connection)

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the other side is gone: its end is noticed where it is read
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages that have come; None at the end of the connection."""
        try:
            data = self.socket.recv(_LONGEST_LINE)
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _LONGEST_LINE:
            return None
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return None

    def close(self) -> None:
        _open.discard(self.socket)
        self.socket.close()


class RankLine(threading.Thread):
    """This rank's end of the connections.

    Args:
        rank: Of this process.
        on_lost: Called once, in this thread: this process, the first one that is lost, and how it was.
    """

    def __init__(self, rank: int, on_lost: Callable[[Member, Member, str], None]) -> None:
        super().__init__(name="rank-line", daemon=True)
        self.me = Member(rank, socket.gethostname(), os.getpid())
        self.on_lost = on_lost
        self.lost: Member | None = None
        self.is_settled = threading.Event()  # a rank was lost, and `on_lost` has returned
        self._is_closing = False
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        self._address: Address | None = None
        self._lines: list[_Line] = []

    def listen(self) -> Address:
        """On rank 0: open a port that the system chooses."""
        self._server = _create_server()
        _open.add(self._server)
        self._selector.register(self._server, selectors.EVENT_READ)
        self._address = Address(self._server.getsockname()[1], secrets.token_hex(16))
        return self._address

    def connect(self, host: str, address: Address) -> None:
        """On the other ranks.

        Raises:
            OSError: rank 0 can't be reached.
        """
        line = _Line(socket.create_connection((host, address.port), CONNECT_TIMEOUT_S))
        line.socket.settimeout(None)
        line.send(token=address.token, me=self.me)
        self._add(line)

    def run(self) -> None:
        """Wait for the first loss or for `close`."""
        while not self._is_closing and self.lost is None:
            for key, _ in self._selector.select(timeout=1.0):
                if key.data is None:
                    assert self._server is not None
                    with contextlib.suppress(OSError):
                        self._add(_Line(self._server.accept()[0]))
                else:
                    self._read(key.data)

    def close(self, error: str | None = None) -> None:
        """Say goodbye, or why this rank must leave."""
        self._is_closing = True
        for line in list(self._lines):
            line.send(**({"bye": True} if error is None else {"lost": self.me, "reason": error}))
            line.close()
        if self._server is not None:
            _open.discard(self._server)
            self._server.close()

    def _add(self, line: _Line) -> None:
        self._lines.append(line)
        self._selector.register(line.socket, selectors.EVENT_READ, line)

    def _drop(self, line: _Line) -> None:
        self._selector.unregister(line.socket)
        self._lines.remove(line)
        line.close()

    def _read(self, line: _Line) -> None:
        messages = line.receive()
        for message in messages or []:
            if "token" in message:
                if self._address is None or not secrets.compare_digest(str(message["token"]), self._address.token):
                    return self._drop(line)  # a stranger
                line.peer = Member(*message["me"])
                line.send(hello=self.me)
            elif "hello" in message:
                line.peer = Member(*message["hello"])
            elif "bye" in message:
                return self._drop(line)
            elif "lost" in message and line.peer is not None:
                return self._lose(Member(*message["lost"]), str(message["reason"]))
        if messages is None and not self._is_closing:
            self._drop(line)
            if line.peer is not None:
                self._lose(line.peer, GONE)
        return None

    def _lose(self, lost: Member, reason: str) -> None:
        if self.lost is not None:
            return
        self.lost = lost
        if self._server is not None:
            for line in self._lines:
                line.send(lost=lost, reason=reason)
        self.on_lost(self.me, lost, reason)
        self.is_settled.set()


def _create_server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
