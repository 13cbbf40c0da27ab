"""Which recipes there are, by what they train on."""

from __future__ import annotations

from pathlib import Path

from cli.compose import compose_all

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("vggt", "cut3r", "diffusionsfm")
ALL = sorted(file.stem for file in (ROOT / "conf").glob("*.yaml"))
MULTIVIEW = [name for name in ALL if any(family in name for family in FAMILIES)]
CLASSIFIERS = [name for name in ALL if name not in MULTIVIEW and name != "predict"]  # which trains nothing


def path(name: str) -> str:
    """Of a recipe's file."""
    return str(ROOT / "conf" / f"{name}.yaml")


def composed(name: str, *overrides: str) -> dict:
    """A recipe's config as Hydra composes it."""
    return compose_all([path(name)], list(overrides)).config


def header(name: str) -> str:
    """The comment that a recipe begins with."""
    lines = Path(path(name)).read_text().splitlines()
    return "\n".join(line for line in lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))])


def smoke_group(name: str) -> str:
    """The group under conf/smoke that shrinks a recipe."""
    if name in MULTIVIEW:
        return next(family for family in FAMILIES if family in name)
    return "vit" if name.startswith("vit") else "fastervit"
