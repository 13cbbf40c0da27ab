"""A progress line with an estimate of the time left, on terminals and in log files alike."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Counts towards a total and says so: many times a second at most on a terminal, every ten seconds elsewhere.

    Args:
        total: of units.
        unit: their name.
        stream: default standard error.
    """

    def __init__(self, total: int, unit: str, stream: TextIO | None = None) -> None:
        self.total, self.unit, self.stream = total, unit, stream or sys.stderr
        self.done = 0
        self._fresh = 0
        self._start = time.monotonic()
        self._last_shown = -1e9
        self._is_terminal = self.stream.isatty()

    def add(self, count: int, kept: bool = False) -> None:
        """`kept` units were there already and say nothing about speed."""
        self.done += count
        self._fresh += 0 if kept else count
        now = time.monotonic()
        if now - self._last_shown >= (0.2 if self._is_terminal else 10.0) or self.done >= self.total:
            self._last_shown = now
            end = "" if self._is_terminal and self.done < self.total else "\n"
            print(f"{chr(13) if self._is_terminal else ''}{self._line(now)}", end=end, file=self.stream, flush=True)

    def _line(self, now: float) -> str:
        rate = self._fresh / max(now - self._start, 1e-9)
        left = f"{_clock((self.total - self.done) / rate)} left" if rate and self.done < self.total else "done"
        left = left if rate or self.done >= self.total else "time left unknown"
        percent = 100 * self.done / max(self.total, 1)
        return f"{self.done:,}/{self.total:,} {self.unit} ({percent:.0f} %), {rate:,.0f}/s, {left}   "


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
