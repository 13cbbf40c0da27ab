"""Speed claims as ratios: ours and its peer alternate in one process, so that a busy machine slows both.

    pin_threads(1)
    assert_close(ours(), peer(), 1e-5)                    # parity first: a fast wrong answer is no claim
    timing = compare(ours, peer)
    record(Row.of(timing, name="FasterViT-0 inference, batch 1", peer_name="fastervit 1.0.0",
                  checked="logits within 1e-5", command="python -m benchmarks fastervit"))

A row is known by its name: recording it again replaces it in `docs/benchmarks.md`, wherever it stood. The table of
targets on top is made of all rows (see `targets.py`). What is written by hand between the two stays.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.targets import summary

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
MARKER = "<!-- rows below are written by the benchmarks: do not edit -->"
SUMMARY, SUMMARY_END = "<!-- targets: written by the benchmarks, do not edit -->", "<!-- end of targets -->"
INTRODUCTION = (
    "# Benchmarks\n\n"
    "Each row comes from one command. Ours and the peer alternate in one process with pinned threads; the ratio is\n"
    "the median over the rounds of peer time / our time (more than 1: we are faster), the spread its quartiles.\n\n"
    f"{SUMMARY}\n{SUMMARY_END}\n"
)
HEADER = ("benchmark", "ratio", "spread", "ours", "peer", "checked first", "command", "date")
FIELDS = ("name", "ratio", "spread", "ours", "peer", "checked", "command", "date")
MIN_ROUNDS = 7

Sections = dict[str, list[tuple[str, ...]]]  # environment → rows


def pin_threads(threads: int) -> None:
    """Let this process, and torch in it, use `threads` threads on as many fixed cores."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def resident_kib(which: str) -> int:
    """Memory of this process: "VmRSS" is that of now, "VmHWM" the most so far; rusage's holds the parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every round, ours and the peer's in the same order."""

    ours_s: list[float]
    peer_s: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self._ratios())

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self._ratios(), n=4)
        return low, high

    def _ratios(self) -> list[float]:
        return [peer / ours for ours, peer in zip(self.ours_s, self.peer_s, strict=True)]


def compare(
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    rounds: int = 9,
    warmup: int = 2,
    min_round_s: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time both in turn. A round repeats a call until it has lasted `min_round_s`; even rounds start with the peer."""
    times = time_in_turn({"peer": peer, "ours": ours}, rounds, warmup, min_round_s, clock)
    return Timing(times["ours"], times["peer"])


def compare_forms(
    forms: Mapping[str, Callable[[], object]],
    peer: Callable[[], object],
    *,
    rounds: int = MIN_ROUNDS,
    warmup: int = 1,
    min_round_s: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """`compare` of several forms of ours with one peer, which is timed once a round."""
    times = time_in_turn({"the peer": peer, **forms}, rounds, warmup, min_round_s, clock)
    return {name: Timing(times[name], times["the peer"]) for name in forms}


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = MIN_ROUNDS,
    warmup: int = 1,
    min_round_s: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call in every round: all in turn, in odd rounds backwards."""
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds={rounds}: a median needs at least {MIN_ROUNDS}")
    gc.collect()
    for call in list(calls.values()) * warmup:
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in reversed(calls) if index % 2 else calls:
            times[name].append(_time_call(calls[name], min_round_s, clock))
    return times


def clock_of(device: str = "cpu") -> Callable[[], float]:
    """Seconds of a GPU once its work is done; of this process with one thread, which other processes disturb less."""
    if device != "cpu":

        def synchronised() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronised
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _time_call(call: Callable[[], object], min_round_s: float, clock: Callable[[], float]) -> float:
    calls, start = 0, clock()
    while True:
        call()
        calls += 1
        elapsed = clock() - start
        if elapsed >= min_round_s:
            return elapsed / calls


def assert_close(ours: Tensor, peer: Tensor, tolerance: float) -> float:
    """Relative L2 error of `ours`; AssertionError above `tolerance`, so that nothing unequal is ever timed."""
    error = float((ours.double() - peer.double()).norm() / peer.double().norm())
    assert error <= tolerance, f"outputs differ by {error:.2e} (tolerance {tolerance:.0e}): nothing was timed"
    return error


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of `docs/benchmarks.md`; every field is printed as it stands."""

    name: str
    ours: str
    command: str
    ratio: str = "–"
    spread: str = "–"
    peer: str = "–"
    checked: str = "–"
    date: str = dataclasses.field(default_factory=lambda: datetime.date.today().isoformat())

    @classmethod
    def of(cls, timing: Timing, *, name: str, peer_name: str, checked: str, command: str, items: int = 0) -> Row:
        """A row of a comparison, in milliseconds a call, or in items a second where a call handles `items` of them."""
        low, high = timing.quartiles
        ours, peer = (_per_call(statistics.median(s), items) for s in (timing.ours_s, timing.peer_s))
        return cls(
            name=name,
            ratio=f"**{timing.ratio:.2f}×**",
            spread=f"{low:.2f}–{high:.2f}",
            ours=ours,
            peer=f"{peer} ({peer_name})",
            checked=checked,
            command=f"`{command}`",
        )

    def cells(self) -> tuple[str, ...]:
        return tuple(getattr(self, field) for field in FIELDS)


def _per_call(seconds: float, items: int) -> str:
    value, unit = (items / seconds, "/s") if items else (seconds * 1e3, " ms")
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"


def environment(*packages: str) -> str:
    """One line on the machine and the versions that the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        values = {line.partition("\t")[0]: line.partition(":")[2].strip() for line in lines}
        if "model name" in values:  # which for some machines is that of several generations
            cpu = f"{values['model name']} (family {values.get('cpu family')}, model {values.get('model')})"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {os.cpu_count()} cores"
    versions = []
    for package in ("torch", *packages):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} (not installed)")
    return "; ".join([device, f"Python {platform.python_version()}", *versions])


def record(*rows: Row, where: str | None = None, document: Path = DOCUMENT) -> None:
    """Print the rows and merge them into the document, under a heading that names the environment."""
    where = where or environment()
    head, sections = _parse(document)
    names = {row.name for row in rows}
    for lines in sections.values():
        lines[:] = [cells for cells in lines if cells[0] not in names]
    sections.setdefault(where, []).extend(row.cells() for row in rows)
    _write(document, head, sections)
    for row in rows:
        print(_line(row.cells()), flush=True)


def withdraw(command: str, document: Path = DOCUMENT) -> Sections:
    """Take the rows of a command out of the document before it runs again, for names may have changed since."""
    head, sections = _parse(document)
    taken = {heading: [cells for cells in lines if cells[6] == f"`{command}`"] for heading, lines in sections.items()}
    for heading, lines in sections.items():
        lines[:] = [cells for cells in lines if cells not in taken[heading]]
    _write(document, head, sections)
    return taken


def restore(taken: Sections, document: Path = DOCUMENT) -> None:
    """Put withdrawn rows back, but for those that were recorded again in between."""
    head, sections = _parse(document)
    names = {cells[0] for lines in sections.values() for cells in lines}
    for heading, lines in taken.items():
        sections.setdefault(heading, []).extend(cells for cells in lines if cells[0] not in names)
    _write(document, head, sections)


def _write(document: Path, head: str, sections: Sections) -> None:
    before, start, rest = head.partition(SUMMARY)
    if start:
        rows = [dict(zip(FIELDS, cells, strict=True)) for lines in sections.values() for cells in lines]
        head = "\n".join([before + start, *summary(rows), SUMMARY_END]) + rest.partition(SUMMARY_END)[2]
    text = [head.rstrip(), "", MARKER]
    for heading, lines in sections.items():
        if lines:
            text += ["", f"## {heading}", "", _line(HEADER), _line(tuple("---" for _ in HEADER))]
            text += [_line(cells) for cells in sorted(lines)]
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text("\n".join(text) + "\n")


def _parse(document: Path) -> tuple[str, Sections]:
    head, _, generated = (document.read_text() if document.exists() else INTRODUCTION).partition(MARKER)
    sections: Sections = {}
    heading = ""
    for line in generated.splitlines():
        if line.startswith("## "):
            heading = line[3:]
            sections.setdefault(heading, [])
        elif line.startswith("| ") and not line.startswith((_line(HEADER), "| ---")):
            sections[heading].append(tuple(cell.strip() for cell in line.strip("|").split(" | ")))
    return head, sections


def _line(cells: tuple[Any, ...]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"
