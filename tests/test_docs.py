"""The documentation builds without a warning, and its page on extending works for somebody who follows it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None or importlib.util.find_spec("material") is None,
    reason="needs mkdocs-material and mkdocstrings: pip install 'restrike[docs]'",
)
def test_the_site_builds_with_warnings_as_errors(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    assert "fonts.googleapis" not in home  # nothing is loaded from elsewhere
    reference = (tmp_path / "site" / "api" / "export" / "index.html").read_text()
    assert 'id="restrike.export.save_onnx"' in reference


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")

    def files(entry):
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                yield from files(value)

    listed = set(files(yaml.safe_load(text)["nav"]))
    there = {str(page.relative_to(ROOT / "docs")) for page in PAGES}
    assert listed == there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipes_that_a_page_names_exist(page):
    for name in re.findall(r"conf/[\w./]+\.yaml", page.read_text(encoding="utf-8")):
        is_example = f"`{name}`" in EXTENDING
        assert is_example or (ROOT / name).is_file(), f"{page.name} names {name}"


def follow(copy: Path) -> None:
    """Do what the page says, by its own words."""
    for name, text in re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)```", EXTENDING, re.DOTALL | re.MULTILINE):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text, encoding="utf-8")
    lines = re.findall(r'^```python\n(    "patchbag": .*\n)```', EXTENDING, re.MULTILINE)
    statement = re.search(r"`(from restrike\.models\.patchbag import variants as patchbag)`", EXTENDING)
    edits = {"restrike/models/registry.py": "_FAMILIES: ", "restrike/checkpoints/key_maps.py": "_MAPS: "}
    assert len(lines) == 2 and statement
    for (name, mapping), line in zip(edits.items(), lines, strict=True):
        source = (copy / name).read_text(encoding="utf-8")
        opening = re.search(rf"^{mapping}.*\{{\n", source, re.MULTILINE)
        assert opening, f"{name} has no {mapping.strip()}"
        source = source[: opening.end()] + line + source[opening.end() :]
        if "patchbag.VARIANTS" in line:
            source = source.replace("from restrike.models.vggt", f"{statement[1]}\nfrom restrike.models.vggt", 1)
        (copy / name).write_text(source, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_new_user_who_follows_the_page_trains_and_exports_a_new_family(tmp_path):
    copy = tmp_path / "checkout"
    for room in ("restrike", "cli", "callbacks", "datamodules", "lightning_modules", "conf"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__", "_app"))
    follow(copy)
    commands = [line for line in EXTENDING.splitlines() if line.startswith("python -m cli") and "DIR" not in line]
    assert [line.split()[3] for line in commands] == ["prepare", "doctor", "fit", "test", "export"]
    small = {
        "prepare": ["--train-per-class", "4", "--val-per-class", "1"],
        "doctor": ["--data.batch_size_per_device", "8"],
        "fit": ["--data.num_workers", "0", "--data.batch_size_per_device", "8", "--trainer.max_epochs", "1"],
        "test": ["--data.num_workers", "0"],
    }
    for line in commands:
        words = line.split()[3:]
        command = [sys.executable, "-m", "cli", *words, *small.get(words[0], [])]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert (copy / "patchbag_s.pt2").is_file()
    assert list((copy / "runs" / "patchbag_s" / "weights").glob("patchbag_s.pth.tar"))
