"""Who may import whom. The library stands without Lightning, Hydra and W&B; rooms above it do not know each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
APPLICATION = ("cli", "lightning_modules", "datamodules", "callbacks")
FAMILIES = ("fastervit", "diffusionsfm", "cut3r", "vggt")
HEAVY = ("lightning", "pytorch_lightning", "hydra", "wandb", "omegaconf", "jsonargparse")


def imported(file: Path) -> set[str]:
    """Absolute dotted names that a file imports, anywhere in it."""
    package = file.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def forbidden_for(path: Path) -> tuple[str, ...]:
    """Prefixes that the file at `path` (relative to the root) may not import."""
    parts = path.parts
    if parts[0] in APPLICATION:
        others = [room for room in APPLICATION if room != parts[0]]
        return tuple(others) if parts[0] != "cli" else ()
    rules = [*APPLICATION, *HEAVY, "tests", "benchmarks"]
    ours = [f"restrike.{p.stem}" for p in (ROOT / "restrike").iterdir() if not p.name.startswith("_")]
    allowed = {
        ("geometry",): [],
        ("optim",): [],
        ("losses",): ["geometry"],
        ("metrics",): ["geometry"],
        ("data",): ["geometry"],
        ("viz",): ["geometry"],
        ("export",): ["geometry"],
        ("models", "layers"): ["geometry"],
        ("models",): ["geometry"],
        ("data_prep",): ["data", "geometry"],
        ("checkpoints",): ["models"],
    }
    for room, friends in allowed.items():
        if parts[1 : 1 + len(room)] == room:
            known = {f"restrike.{friend}" for friend in [*friends, room[0]]}
            rules += [name for name in ours if name not in known]
            break
    if parts[1:2] == ("models",) and parts[2:3] and parts[2] in FAMILIES:
        rules += [f"restrike.models.{family}" for family in FAMILIES if family != parts[2]]
    if parts[1:3] == ("models", "layers"):
        rules += [f"restrike.models.{family}" for family in FAMILIES]
    if parts[1:2] == ("geometry",):
        rules += ["timm", "torchvision", "torchmetrics", "cv2", "PIL"]
    return tuple(rules)


FILES = sorted(
    file.relative_to(ROOT) for room in ("restrike", *APPLICATION) for file in (ROOT / room).rglob("*.py")
)  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    doors = {
        Path("restrike/app.py"): {"cli.__main__", "cli.__main__.main"},  # the wheel's entry point
        # timm asks the model itself to load a file; imported when it does.
        Path("restrike/models/fastervit/model.py"): {"restrike.checkpoints", "restrike.checkpoints.load_released"},
    }
    names = imported(ROOT / path) - doors.get(path, set())
    wrong = {n for n in names for prefix in forbidden_for(path) if n == prefix or n.startswith(f"{prefix}.")}
    assert not wrong, f"{path} may not import {sorted(wrong)}"


def test_the_walk_sees_a_forbidden_import(tmp_path, monkeypatch):
    file = tmp_path / "restrike" / "geometry" / "bad.py"
    file.parent.mkdir(parents=True)
    file.write_text("def f():\n    from lightning.pytorch import Trainer\n    return Trainer\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert any(name.startswith("lightning") for name in imported(file))


def test_importing_restrike_imports_nothing_heavy():
    program = (
        "import sys, restrike; sys.exit(bool({'torch', 'timm', 'lightning', 'hydra', 'wandb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
