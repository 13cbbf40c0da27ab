"""Processes that tests may kill, forked by a server that has imported torch and Lightning: they start in no time."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120
_PRELOAD = ["torch._dynamo", "lightning.pytorch", "torchmetrics", "cli.main", "resume.harness"]


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [inherited])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # the server starts without pytest's sys.path
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    if inherited is not None:
        os.environ["PYTHONPATH"] = inherited
    return context


def start(function: Callable[..., Any], *args: Any, log: Path, ranks: int = 1) -> list[BaseProcess]:
    """Start `function(*args)` on as many ranks, in an environment like a launcher's; their output goes to `log`."""
    environment = {"OMP_NUM_THREADS": "1"}
    port = free_port()
    processes = []
    for rank in range(ranks):
        if ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"TORCHELASTIC_RUN_ID": "test"}
        process = _context().Process(target=_enter, args=(function, args, dict(environment), str(log)))
        process.start()
        processes.append(process)
    return processes


def wait(processes: list[BaseProcess]) -> list[int]:
    """Exit statuses (minus the signal's number for a killed process); what does not end in time is killed: -9."""
    for process in processes:
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in processes]


def run(function: Callable[..., Any], *args: Any, log: Path, ranks: int = 1) -> list[int]:
    """`start` and `wait`."""
    return wait(start(function, *args, log=log, ranks=ranks))


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enter(function: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    import torch

    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    function(*args)
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
