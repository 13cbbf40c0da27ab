"""Every speed claim, each in its own process; rows go to docs/benchmarks.md.

python -m benchmarks                          # all measures (`make bench`)
python -m benchmarks --list                   # measures by number, with their peers, targets and commands
python -m benchmarks 3 11                     # measures 3 and 11
python -m benchmarks ema fastervit training   # by name; a command with several measures has parts
python -m benchmarks fastervit --device cuda  # on a GPU
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.targets import MEASURES, ON_GPU, PARTS, listing

HERE = Path(__file__).resolve().parent
FRAME = ("harness", "targets")
# numpy's BLAS has threads that wait busily, so that its calls would cost more processor time than they take.
SURROUNDINGS = {"OPENBLAS_NUM_THREADS": "1"}
NAMES = sorted(file.stem for file in HERE.glob("*.py") if not file.stem.startswith("_") and file.stem not in FRAME)


def commands(words: Iterable[str]) -> list[str]:
    """What to run for these names, parts and numbers, in order and once; all measures for none.

    Raises:
        ValueError: a word that is none of them.
    """
    split = [part for word in words for part in word.split()] or [str(number) for number in MEASURES]
    chosen: list[tuple[str, list[str]]] = []
    for word in split:
        if word in NAMES:
            chosen.append((word, []))
        elif chosen and word in PARTS.get(chosen[-1][0], ()):
            chosen[-1][1].append(word)
        elif word.isdecimal() and int(word) in MEASURES:
            for command in MEASURES[int(word)].commands:
                name, *parts = command.split()
                chosen.append((name, parts))
        else:
            parts_of = "; ".join(f"{name} has the parts {', '.join(parts)}" for name, parts in PARTS.items())
            raise ValueError(
                f"no benchmark called {word}: there are {', '.join(NAMES)}, and measures 1 to {max(MEASURES)} "
                f"({parts_of}; --list prints them)"
            )
    lines = []
    for name, parts in chosen:
        lines += [f"{name} {part}".strip() for part in parts or PARTS.get(name, ("",))]
    return list(dict.fromkeys(lines))


def check_device(device: str, lines: list[str]) -> None:
    """Refuse a device that is not there, or a benchmark that has no form for it.

    Raises:
        ValueError: with the mend.
    """
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no GPU that PyTorch can use; leave the option out")
    if without := sorted({line.split()[0] for line in lines} - {*ON_GPU}):
        raise ValueError(f"--device is for {', '.join(ON_GPU)}, not for {', '.join(without)}")


def run(line: str, device: str | None) -> bool:
    """Run one command; whether it succeeded. Its old rows go, so that none is left of a row that got another name."""
    name, *parts = line.split()
    options = ["--device", device] if device else []
    from benchmarks import harness  # imports torch, which --list and mistakes need not wait for

    taken, is_done = harness.withdraw(" ".join(["python -m benchmarks", line, *options])), False
    try:
        command = [sys.executable, "-m", f"benchmarks.{name}", *parts, *options]
        is_done = subprocess.run(command, cwd=HERE.parent, env=SURROUNDINGS | os.environ, check=False).returncode == 0
    finally:
        if not is_done:
            harness.restore(taken)
    return is_done


def main(arguments: list[str]) -> int:
    """Run the named benchmarks, or all; 1 if one failed, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name | number")
    parser.add_argument("--list", action="store_true", help="print the measures and stop")
    parser.add_argument("--device", help=f"cuda: run {', '.join(ON_GPU)} on a GPU")
    args = parser.parse_args(arguments)
    if args.list:
        print(listing())
        return 0
    try:
        lines = commands(args.names or (ON_GPU if args.device else ()))
        if args.device:
            check_device(args.device, lines)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that withdrawn rows come back
    began, failed = time.monotonic(), []
    for number, line in enumerate(lines, start=1):
        start = time.monotonic()
        print(f"== {line} ({number}/{len(lines)})", flush=True)
        failed += [] if run(line, args.device) else [line]
        now = time.monotonic()
        print(f"== {line}: {_minutes(now - start)}, {_minutes(now - began)} in all", flush=True)
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
