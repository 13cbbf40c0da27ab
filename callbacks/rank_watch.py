"""A lost rank ends the job within seconds, and every rank that is left names it.

Left to itself, gloo fails with the number of a TCP port, and NCCL waits for its timeout of half an hour.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.rank_line import Member, RankLine

_SETTLE_S = 2.0  # a collective may fail a moment before the connection does


class RankWatch(Callback):
    """Watches the other ranks over idle connections, in a thread; a step costs nothing, one rank alone is not watched.

    When a rank dies, or leaves with an error, each of the others says which one, on stderr. Its main thread then has a
    few seconds to end by itself, as it does where the collective fails (gloo); one that goes on waiting (NCCL) is ended
    with status 1. Checkpoints are whole or not there, so `--ckpt_path last` goes on from the newest.

    A killed process is noticed at once, a machine without power after 25 s.

    Args:
        grace_s: Seconds for the main thread to leave its collective and close its logs.
    """

    def __init__(self, grace_s: float = 10.0) -> None:
        self.grace_s = grace_s
        self._line: RankLine | None = None
        self._is_leaving = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect. Every rank must call it; the process group is up by now."""
        if trainer.world_size == 1 or self._line is not None:
            return
        line = RankLine(trainer.global_rank, self._end)
        address = trainer.strategy.broadcast(line.listen() if trainer.is_global_zero else None)
        if address is not None and not trainer.is_global_zero:
            environment = getattr(trainer.strategy, "cluster_environment", None)
            try:
                line.connect(getattr(environment, "main_address", "127.0.0.1"), address)
            except OSError as error:
                warnings.warn(f"{line.me} can't reach rank 0, and is not watched ({error})", stacklevel=2)
                return
        self._is_leaving.clear()
        self._line = line
        line.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say goodbye."""
        self._close(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others why this rank leaves, unless it leaves because of another one, or in good order."""
        if self._line is None:
            return
        self._is_leaving.set()
        if isinstance(exception, RuntimeError):
            self._line.is_settled.wait(_SETTLE_S)  # most likely a collective: find out whose fault it is
        in_order = self._line.lost is not None or isinstance(exception, SystemExit | KeyboardInterrupt)
        self._close(None if in_order else f"ended with {type(exception).__name__}: {str(exception)[:200]}")

    def _close(self, error: str | None) -> None:
        line, self._line = self._line, None
        self._is_leaving.set()
        if line is not None:
            line.close(error)

    def _end(self, me: Member, lost: Member, reason: str) -> None:
        """In the watching thread."""
        advice = "Start the job again with --ckpt_path last"
        print(f"error: {lost} {reason}; {me} can't go on without it and ends. {advice}", file=sys.stderr, flush=True)
        threading.Thread(target=self._end_after_grace, name="rank-watch", daemon=True).start()

    def _end_after_grace(self) -> None:
        if not self._is_leaving.wait(self.grace_s):
            os._exit(1)
