"""The result of a test, beside what it has to beat."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from restrike.metrics import majority_class_accuracy


class Report(Callback):
    """At the end of a test prints a table, and writes `report.md` and `report.json` into the run folder."""

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
        record = {"step": trainer.global_step, "images": sum(counts) if counts else None, **metrics}
        (root / "report.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        table = result_table(metrics)
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


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
