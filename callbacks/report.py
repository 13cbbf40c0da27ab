"""The result of a test, beside what it has to beat."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from restrike.metrics import majority_class_accuracy


class Report(Callback):
    """At the end of a test prints a table, and writes `report.md` and `report.json` into the run folder.

    Where the frames of an evaluation are frozen in a file (`data.val_frames`), its hash stands beside the numbers;
    where the data say what an evaluation is called (`evaluation_frames`), that does.
    """

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank 0 writes what all ranks have summed."""
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        counts = getattr(trainer.datamodule, "class_counts", {}).get("test")
        if counts:
            metrics["test/top1_majority_class"] = majority_class_accuracy(counts)
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        tested = Path(str(trainer.ckpt_path)).name if trainer.ckpt_path else None
        record = {"checkpoint": tested, "images": sum(counts) if counts else None, **metrics}
        is_classifier = any(name.startswith("test/top1") for name in metrics)
        table = result_table(metrics) if is_classifier else metric_table(metrics)
        if said := getattr(trainer.datamodule, "evaluation_frames", None):
            record["protocol"] = said
            table = f"{said}\n\n{table}"
        if frames := frozen_frames(getattr(trainer.datamodule, "val_frames", None) or root / "val_frames.json"):
            record["frames"] = frames
            table += f"\n\nframes: {frames}"
        (root / "report.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (root / "report.md").write_text(table + "\n", encoding="utf-8")
        print(f"\n{table}\n")


def result_table(metrics: dict[str, float]) -> str:
    """A Markdown table with a row for each kind of weights that was tested, and one for the baseline."""
    rows = [("weights", "top-1", "top-5", "loss"), ("---", "---:", "---:", "---:")]
    for title, suffix in (("raw", ""), ("EMA", "_ema"), ("majority class", "_majority_class")):
        if f"test/top1{suffix}" in metrics:
            top1, top5, loss = (metrics.get(f"test/{name}{suffix}") for name in ("top1", "top5", "loss"))
            rows.append((title, _percent(top1), _percent(top5), "" if loss is None else f"{loss:.4f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for index, row in enumerate(rows):
        cells = [row[0].ljust(widths[0], "-" if index == 1 else " ")]
        cells += [
            cell.rjust(width, "-" if index == 1 else " ") for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def frozen_frames(path: str | Path) -> str | None:
    """Name and hash of a list of frames; None where there is no such file."""
    path = Path(path).expanduser()
    if not path.is_file():
        return None
    from restrike.data.multiview_frames import frame_lists_hash, load_frame_lists

    return f"{path.name}, sha256 {frame_lists_hash(load_frame_lists(path))}"


WEIGHTS = {
    "": "raw",
    "_ema": "EMA",
    "_untrained": "untrained",
    "_other_images": "other images",
    "_mean_motion": "mean motion",
    "_trivial": "trivial",
}


def metric_table(metrics: dict[str, float]) -> str:
    """A Markdown table with a row for each metric of a test, and a column for each kind of weights and baseline."""
    cells: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        plain = name.removeprefix("test/")
        suffix = next((s for s in WEIGHTS if s and plain.endswith(s)), "")
        cells.setdefault(plain.removesuffix(suffix), {})[suffix] = value
    used = [suffix for suffix in WEIGHTS if any(suffix in row for row in cells.values())]
    width = max(map(len, cells), default=0)
    columns = {suffix: max(9, len(WEIGHTS[suffix])) for suffix in used}
    lines = [f"| {'metric':<{width}} |" + "".join(f" {WEIGHTS[s]:>{n}} |" for s, n in columns.items())]
    lines.append(f"| {'-' * width} |" + "".join(f" {'-' * (n - 1)}: |" for n in columns.values()))
    for name, row in cells.items():
        numbers = (f" {row[s]:{n}.4f} |" if s in row else f" {'':{n}} |" for s, n in columns.items())
        lines.append(f"| {name:<{width}} |" + "".join(numbers))
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
