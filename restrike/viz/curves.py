"""Training curves from a CSV of metrics."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

Curve = tuple[list[float], list[float]]


def read_metrics(path: Path) -> dict[str, Curve]:
    """Columns of a CSV with a `step` column: name → (steps, values), empty cells left out."""
    curves: dict[str, Curve] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if name in ("step", "epoch") or not cell or not row.get("step"):
                    continue
                steps, values = curves.setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(float(cell))
    return curves


def join_metrics(parts: Sequence[Path]) -> dict[str, Curve]:
    """`read_metrics` of a run that was resumed: each part takes over at its own first step."""
    joined: dict[str, Curve] = {}
    for curves in map(read_metrics, parts):
        begin = min((steps[0] for steps, _ in curves.values()), default=float("inf"))
        for name in joined.keys() | curves.keys():
            kept = [(step, value) for step, value in zip(*joined.get(name, ([], [])), strict=True) if step < begin]
            kept += zip(*curves.get(name, ([], [])), strict=True)
            joined[name] = [step for step, _ in kept], [value for _, value in kept]
    return joined


def plot_curves(metrics: Path | Sequence[Path], out: Path) -> Path:
    """Draw losses, accuracies and learning rate over optimiser steps, side by side, from CSVs into a PNG.

    Args:
        metrics: As `read_metrics` or, for several files in order, `join_metrics` takes it; names that hold "loss",
            "top1", "top5", "auc@30", "abs_rel" or begin with "lr" are drawn.
        out: The picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    curves = join_metrics([metrics] if isinstance(metrics, Path) else metrics)
    panels = {
        "loss": [name for name in curves if "loss" in name],
        "accuracy": [name for name in curves if "top1" in name or "top5" in name],
        "poses: AUC@30": [name for name in curves if "auc@30" in name and "invariant" not in name],
        "depth: AbsRel": [name for name in curves if "abs_rel" in name],
        "learning rate": _distinct([name for name in sorted(curves) if name.startswith("lr")], curves),
    }
    panels = {title: names for title, names in panels.items() if names}
    figure = Figure(figsize=(5 * max(len(panels), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for name in sorted(names):
            steps, values = curves[name]
            is_training = name.startswith(("train/", "lr"))
            axes.plot(steps, values, label=name, linewidth=1, marker=None if is_training else ".", markersize=4)
        axes.set_title(title)
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out


def _distinct(names: list[str], curves: dict[str, Curve]) -> list[str]:
    """One name of each set of equal curves: parameter groups mostly share their learning rate."""
    return [name for i, name in enumerate(names) if all(curves[name] != curves[other] for other in names[:i])]
