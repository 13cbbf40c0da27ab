"""Remote shards, fetched to this node before the workers need them."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress

import numpy as np

from restrike.data.cache import ShardCache
from restrike.data.shards import ShardFile
from restrike.data.source import ImageSource


class ShardsAhead:
    """Fetches remote shards on background threads in the order in which they will be needed.

    Failures are left to the worker that needs the shard: it tries again and reports.
    """

    _THREADS = 2

    def __init__(self, source: ImageSource, cache: ShardCache) -> None:
        self._source, self._cache = source, cache
        self._asked: set[str] = set()
        self._queue: queue.SimpleQueue[ShardFile] = queue.SimpleQueue()
        self._started = False

    def forget(self) -> None:
        self._asked.clear()

    def ask(self, ids: np.ndarray) -> None:
        for file in self._source.will_read(ids):
            if file.location not in self._asked:
                self._asked.add(file.location)
                self._queue.put(file)
                self._start()

    def _start(self) -> None:
        """Late, so that workers that are forked before do not inherit threads."""
        if not self._started:
            self._started = True
            for _ in range(self._THREADS):
                threading.Thread(target=self._run, daemon=True, name="shards-ahead").start()

    def _run(self) -> None:
        while True:
            file = self._queue.get()
            with suppress(OSError):
                self._cache.path(file.location, file.bytes, file.sha256)
