"""What `make quickstart` reaches, and how long its training takes: top-1 on held-out digits, wall clock."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Row, environment, record

ROOT = Path(__file__).resolve().parents[1]


def _cli(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cli", *arguments], cwd=ROOT, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Prepare, fit and test in a temporary folder, and record one row."""
    with tempfile.TemporaryDirectory() as folder:
        data, run = f"{folder}/digits", f"{folder}/run"
        _cli("prepare", "digits", "--out", data)
        line = ["--config", "conf/quickstart.yaml", "--run_dir", run, "--data.data", data]
        seconds = _cli("fit", *line)
        _cli("test", *line, "--ckpt_path", "last")
        report = json.loads((Path(run) / "report.json").read_text())
    top1 = {name: 100 * report[f"test/top1{name}"] for name in ("", "_ema", "_majority_class")}
    row = Row(
        name="Quickstart: top-1 on 360 held-out digits, and time of `fit`",
        ours=f"EMA {top1['_ema']:.1f} %, raw {top1['']:.1f} %, {seconds:.0f} s",
        peer=f"{top1['_majority_class']:.1f} % (majority class)",
        command="`python -m benchmarks quickstart`",
    )
    record(row, where=environment("lightning", "timm"))


if __name__ == "__main__":
    main()
