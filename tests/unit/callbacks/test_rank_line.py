"""Connections over which a lost rank is noticed: within one process here, between real ranks in tests/faults."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from callbacks.rank_line import GONE, Member, RankLine

TIMEOUT_S = 20


class Ranks:
    """Rank 0 and two more, and what each has heard."""

    def __init__(self) -> None:
        self.heard: dict[int, tuple[Member, str]] = {}
        self.hub = RankLine(0, self.hear)
        self.address = self.hub.listen()
        self.lines = [self.hub, *(self.join(rank) for rank in (1, 2))]
        self.hub.start()
        for line in self.lines:
            wait_until(lambda line=line: all(each.peer for each in line._lines) and line._lines)
        wait_until(lambda: len(self.hub._lines) == 2)

    def join(self, rank: int) -> RankLine:
        line = RankLine(rank, self.hear)
        line.connect("127.0.0.1", self.address)
        line.start()
        return line

    def hear(self, me: Member, lost: Member, reason: str) -> None:
        self.heard[me.rank] = lost, reason

    def die(self, rank: int) -> None:
        """What the kernel does to a killed process's connections; its thread does nothing more."""
        self.lines[rank]._is_closing = True
        for line in self.lines[rank]._lines:
            line.socket.shutdown(socket.SHUT_RDWR)


def wait_until(condition) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    for line in ranks.lines:
        line.close()
        line.join(TIMEOUT_S)


def test_every_rank_hears_which_one_died(ranks: Ranks) -> None:
    ranks.die(1)
    wait_until(lambda: {0, 2} <= ranks.heard.keys())
    for listener in (0, 2):
        assert ranks.heard[listener] == (Member(1, socket.gethostname(), os.getpid()), GONE)


def test_the_death_of_rank_0_is_heard_by_all(ranks: Ranks) -> None:
    ranks.die(0)
    wait_until(lambda: {1, 2} <= ranks.heard.keys())
    assert [ranks.heard[listener][0].rank for listener in (1, 2)] == [0, 0]


def test_an_error_is_passed_on_with_its_reason(ranks: Ranks) -> None:
    ranks.lines[2].close("ended with KeyError: 'x'")
    wait_until(lambda: {0, 1} <= ranks.heard.keys())
    assert ranks.heard[1] == (ranks.lines[2].me, "ended with KeyError: 'x'")


def test_goodbyes_alarm_nobody(ranks: Ranks) -> None:
    for line in reversed(ranks.lines):
        line.close()
        line.join(TIMEOUT_S)
    assert ranks.heard == {}
    assert not any(thread.name == "rank-line" for thread in threading.enumerate())


@pytest.mark.parametrize("words", [b"", b"hello\n", b'{"token": "guess", "me": [1, "a", 2]}\n', b"x" * 10_000])
def test_strangers_are_not_believed(ranks: Ranks, words: bytes) -> None:
    with socket.create_connection(("127.0.0.1", ranks.address.port)) as stranger:
        stranger.sendall(words + b'{"lost": [2, "host", 1], "reason": "a lie"}\n')
        if words:
            stranger.settimeout(TIMEOUT_S)
            try:
                assert stranger.recv(100) == b"", "the connection is closed"
            except ConnectionResetError:
                pass
    ranks.die(2)
    wait_until(lambda: {0, 1} <= ranks.heard.keys())
    assert ranks.heard[0] == (ranks.lines[2].me, GONE)


def test_a_forked_child_does_not_keep_a_dead_ranks_connection_open() -> None:
    reading, writing = os.pipe()
    heard = threading.Event()
    hub = RankLine(0, lambda *_: heard.set())
    address = hub.listen()
    rank = os.fork()
    if rank == 0:  # a rank whose worker lives longer than itself
        line = RankLine(1, lambda *_: None)
        line.connect("127.0.0.1", address)
        worker = os.fork()
        if worker == 0:
            os.close(writing)
            os.read(reading, 1)  # until the test ends
        os._exit(0)
    hub.start()
    os.waitpid(rank, 0)
    assert heard.wait(TIMEOUT_S)
    os.close(writing)
    os.close(reading)
    hub.close()
    hub.join(TIMEOUT_S)
