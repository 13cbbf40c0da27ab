"""The wheel: only `restrike` reaches site-packages, and its console script runs a packaged recipe from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_wheel_runs_a_packaged_recipe_from_any_folder(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True)
    wheel = next(tmp_path.glob("restrike-*.whl"))
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert {entry.name for entry in site.iterdir() if not entry.name.endswith(".dist-info")} == {"restrike"}
    program = "import sys; from restrike.app import main; sys.exit(main())"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-c", program, "fit", "--config", "conf/fastervit_0.yaml", "--print_config"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "faster_vit_0_224" in done.stdout
