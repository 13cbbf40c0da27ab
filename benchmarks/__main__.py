"""`python -m benchmarks [name …]`: every speed claim, each in its own process; rows go to docs/benchmarks.md.

Options are handed on to the benchmarks that are named: `python -m benchmarks cut3r --full`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = sorted(file.stem for file in HERE.glob("*.py") if not file.stem.startswith("_") and file.stem != "harness")


def main(arguments: list[str]) -> int:
    """Run the named benchmarks, or all; 1 if one failed, 2 for an unknown name."""
    names = [argument for argument in arguments if not argument.startswith("-")]
    options = [argument for argument in arguments if argument.startswith("-")]
    if options and not names:
        print(f"error: {' '.join(options)} needs the name of a benchmark before it", file=sys.stderr)
        return 2
    if unknown := [name for name in names if name not in NAMES]:
        print(f"error: no benchmark called {', '.join(unknown)}: there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    failed = []
    for number, name in enumerate(names or NAMES, start=1):
        print(f"== {name} ({number}/{len(names or NAMES)})", flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], cwd=HERE.parent, check=False)
        failed += [name] if done.returncode else []
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
