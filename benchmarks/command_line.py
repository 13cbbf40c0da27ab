"""How long the command line takes to answer: whole processes, wall clock."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import Row, record

ROOT = Path(__file__).resolve().parents[1]
RUNS = 9
COMMANDS = {
    "--help": ["--help"],
    "fit --help": ["fit", "--help"],
    "fit --print_config of FasterViT-0": ["fit", "--config", "conf/fastervit_0.yaml", "--print_config"],
}


def _seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cli", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Record the median of several processes each; there is no peer."""
    for name, arguments in COMMANDS.items():
        _seconds(arguments)  # warm the file cache
        seconds = sorted(_seconds(arguments) for _ in range(RUNS))
        low, _, high = statistics.quantiles(seconds, n=4)
        row = Row(
            name=f"Command line: {name}",
            ours=f"{statistics.median(seconds):.2f} s",
            spread=f"{low:.2f}–{high:.2f} s",
            command="`python -m benchmarks command_line`",
        )
        record(row)


if __name__ == "__main__":
    main()
