"""What is measured, what each figure should reach, and which rows of `docs/benchmarks.md` show it.

`python -m benchmarks --list` prints it; the harness makes the table on top of the document of it and of the rows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
# Commands that can be run in parts, each a row of the table of measures or several, and what runs on a GPU.
PARTS: dict[str, tuple[str, ...]] = {
    "fastervit": ("inference", "large", "compiled", "any-res", "training"),
    "vggt": ("step", "memory"),
    "cut3r": ("rollouts", "sequences", "memory", "training", "full"),
    "diffusionsfm": ("rays", "cameras", "sparse", "dense"),
}
# What runs only where it is named, and not with all measures.
BESIDE = {
    "callbacks": "what each callback adds to a step",
    "quickstart": "what `make quickstart` reaches",
    "vggt memory": "peak by number of views: training, fine-tuning, inference",
    "diffusionsfm rays": "cameras to rays",
    "cut3r training": "a training step, and its memory by number of views under each option",
    "cut3r full": "inference at the released size",
}
ON_GPU = ("fastervit", "ema", "vggt")


@dataclasses.dataclass(frozen=True)
class Goal:
    """One bound on the figures of the rows whose name matches.

    Args:
        rows: Regular expression, searched in a row's name.
        text: The bound in words.
        at_least: Least ratio, where there is one.
        at_most: Greatest figure, where there is one.
        column: Where the figure stands, as its first number.
        unit: Of the figure.
        needs: "all" rows must reach it, or the "best" of each group, which is the row's name up to its last comma.
    """

    rows: str
    text: str
    at_least: float | None = None
    at_most: float | None = None
    column: Literal["ratio", "ours"] = "ratio"
    unit: str = "×"
    needs: Literal["all", "best"] = "all"

    def figures(self, rows: Iterable[Mapping[str, str]]) -> list[float]:
        """The figures of the rows that it is about; with "best", of the best row of each group."""
        groups: dict[str, list[float]] = {}
        for row in rows:
            found = NUMBER.search(row[self.column])
            if re.search(self.rows, row["name"]) and found:
                group = row["name"].rpartition(",")[0] if self.needs == "best" else row["name"]
                groups.setdefault(group, []).append(float(found[0].replace(",", "")))
        best = min if self.at_most is not None else max
        return [best(group) for group in groups.values()]

    def is_met(self, figure: float) -> bool:
        return (self.at_least is None or figure >= self.at_least) and (self.at_most is None or figure <= self.at_most)

    def measured(self, figures: list[float]) -> str:
        """Their range."""
        if not figures:
            return "–"
        low, high = min(figures), max(figures)
        span = f"{low:,.4g}" if low == high else f"{low:,.4g}–{high:,.4g}"
        return f"{span} {self.unit}".replace(" ×", "×")

    def verdict(self, figures: list[float]) -> str:
        """Met, missed, or how many of the rows reach it."""
        if not figures:
            return "not measured"
        if self.at_least is None and self.at_most is None:
            return "reported"
        met = sum(map(self.is_met, figures))
        if met in (0, len(figures)):
            return "met" if met else "**missed**"
        return f"**missed** by {len(figures) - met} of {len(figures)}"


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is compared with what, its bounds, and the commands that measure it."""

    title: str
    peer: str
    work: str
    commands: tuple[str, ...]
    goals: tuple[Goal, ...]


MEASURES: dict[int, Measure] = {
    1: Measure(
        "FasterViT inference",
        "`fastervit` package",
        "variants 0, 2, 4, float32, batch 1 and 8; any-res 576x960",
        ("fastervit inference", "fastervit large", "fastervit compiled", "fastervit any-res"),
        (
            Goal(r"^FasterViT-\w+( any-res)? inference(?!.* on cuda).*, eager$", "≥ 1.3× eager", at_least=1.3),
            Goal(
                r"^FasterViT-\w+( any-res)? inference(?!.*( on cuda|compiled peer)).*, (deployed|compiled)$",
                "≥ 2× compiled or deployed",
                at_least=2.0,
                needs="best",
            ),
        ),
    ),
    2: Measure(
        "FasterViT training step with EMA and MESA",
        "the same step with the `fastervit` model, timm's ModelEmaV2",
        "variant 0, batch 8",
        ("fastervit training",),
        (Goal(r"^FasterViT-0 training step with EMA and MESA", "≥ 1.5×", at_least=1.5),),
    ),
    3: Measure(
        "EMA update",
        "timm's V2 and V3, Lightning's weight averaging",
        "31 M parameters",
        ("ema",),
        (
            Goal(r"^EMA update.*ModelEmaV2", "≥ 6× V2", at_least=6),
            Goal(r"^EMA update.*ModelEmaV3", "≥ 1.2× V3", at_least=1.2),
            Goal(r"^EMA update.*Lightning", "Lightning's: reported"),
            Goal(r"^EMA update.*share of a training step", "≤ 2 % of a step", at_most=2, column="ours", unit="%"),
        ),
    ),
    4: Measure(
        "shard to augmented uint8 batch",
        "timm's create_loader, torchvision, webdataset, LitData",
        "crop to 224, flip, RandAugment (full); without RandAugment (light)",
        ("loader",),
        (
            Goal(r"^Loader, (full|light).*timm create_loader", "≥ 2× timm", at_least=2),
            Goal(r"^Loader, (full|light).*(webdataset|LitData)", "≥ 1.3× each streaming peer", at_least=1.3),
        ),
    ),
    5: Measure(
        "time to the first batch after a resume at sample 10^6",
        "webdataset by skipping, LitData",
        "index of 1.28 M samples",
        ("resume_position",),
        (
            Goal(r"^First batch after a resume.*against skipping", "≥ 100× skipping", at_least=100),
            Goal(r"^First batch after a resume.*LitData", "LitData's: reported"),
            Goal(r"^First batch after a resume.*against sample 0", "O(1): ≥ 0.8× sample 0", at_least=0.8),
        ),
    ),
    6: Measure(
        "CO3D scene: 8 views to crops, depth, rays, normalised",
        "a plain per-frame reader",
        "toy CO3D",
        ("multiview_loader",),
        (Goal(r"^CO3D scene of 8 views", "≥ 5×", at_least=5),),
    ),
    7: Measure(
        "rays to cameras",
        "OpenCV's RANSAC, a camera at a time",
        "8 views of 16x16 and 256x256 rays, batch 8",
        ("diffusionsfm cameras",),
        (Goal(r"(?i)cameras from .*rays|rays to cameras", "≥ 3×, error no larger", at_least=3),),
    ),
    8: Measure(
        "CUT3R rollout",
        "a plain view-by-view rollout",
        "T = 8 … 256",
        ("cut3r rollouts", "cut3r sequences", "cut3r memory"),
        (
            Goal(r"^CUT3R (inference|rollout)(?!.*memory)", "≥ 1.3×", at_least=1.3),
            Goal(
                r"^CUT3R (inference|rollout).*memory per further view",
                "memory slope 0 in inference",
                at_most=0.1,
                column="ours",
                unit="MiB a view",
            ),
        ),
    ),
    9: Measure(
        "VGGT forward + backward",
        "a plain implementation that keeps all layers",
        "V = 2, 8, 24",
        ("vggt step",),
        (
            Goal(r"^VGGT forward \+ backward, .*, time, selective", "≥ 1.2× time", at_least=1.2),
            Goal(
                r"^VGGT forward \+ backward, .*, peak, selective",
                "peak ≤ 0.6× of the peer's",
                at_most=0.6,
                column="ours",
            ),
        ),
    ),
    10: Measure(
        "DiffusionSfM sampling",
        "a plain sampler",
        "small DiT + DPT",
        ("diffusionsfm sparse", "diffusionsfm dense"),
        (Goal(r"^DiffusionSfM (sparse|dense).*(calls?|early stop|sampling)", "≥ 1.5× at equal calls", at_least=1.5),),
    ),
    11: Measure(
        "checkpoint save",
        "Lightning's atomic save, torch.save, the raw write",
        "1 GB",
        ("checkpoint",),
        (
            Goal(r"^Save of 1 GB, extra memory", "extra memory < 64 MB", at_most=64, column="ours", unit="MB"),
            Goal(r"^Save of 1 GB against a raw write", "≤ 1.1× its time (ratio ≥ 0.91×)", at_least=1 / 1.1),
        ),
    ),
    12: Measure(
        "pose and reconstruction metrics",
        "straightforward loops",
        "10^4 pairs",
        ("metrics",),
        (Goal(r"(?i)^(nearest neighbours|pose metrics|reconstruction)", "≥ 20×", at_least=20),),
    ),
    13: Measure(
        "cold start",
        "Lightning's CLI with the same classes",
        "`--help`; config to first step",
        ("cold_start",),
        (
            Goal(r"^Cold start: --help", "< 1 s", at_most=1000, column="ours", unit="ms"),
            Goal(r"^Cold start: config to", "< 8 s", at_most=8000, column="ours", unit="ms"),
        ),
    ),
    14: Measure(
        "use of the machine",
        "its own measured peak of a matrix product",
        "a training step of each family",
        ("utilisation",),
        (Goal(r"^Use of the machine", "reported"),),
    ),
}


def listing() -> str:
    """The measures as `--list` prints them."""
    lines = []
    for number, measure in MEASURES.items():
        goals = "; ".join(goal.text for goal in measure.goals)
        lines.append(f"{number:>2}  {measure.title}: {measure.work}\n    against {measure.peer}\n    target: {goals}")
        lines += [f"    python -m benchmarks {command}" for command in measure.commands]
    lines.append("Beside these, by name only:")
    lines += [f"    python -m benchmarks {command:<20} {what}" for command, what in BESIDE.items()]
    return "\n".join(lines)


def summary(rows: list[Mapping[str, str]]) -> list[str]:
    """The table of measures, targets and what the rows say of them, as lines of Markdown."""
    lines = ["| # | measure | target | measured | |", "| --- | --- | --- | --- | --- |"]
    for number, measure in MEASURES.items():
        for index, goal in enumerate(measure.goals):
            figures = goal.figures(rows)
            head = (str(number), measure.title) if not index else ("", "")
            cells = (*head, goal.text, goal.measured(figures), goal.verdict(figures))
            lines.append("| " + " | ".join(cells) + " |")
    return lines
