"""What the README tells people to type works: each of its commands runs here, at smoke size."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli.__main__ import main
from recipes import smoke_group

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(block for language, block in BLOCKS if language == "bash")
COMMANDS = [line for line in SHELL.splitlines() if line.startswith("python -m cli")]
SMALL_SETS = {
    "imagenet": ["--train-shards", "2", "--val-shards", "1"],
    "toy": ["--categories", "apple", "cup", "--sequences", "4", "--frames", "8", "--size", "64"],
}
RELEASED = {"fastervit_0_224_1k.pth.tar": "fastervit_0", "fastervit_4_224_1k.pth.tar": "fastervit_4"}
pytestmark = pytest.mark.filterwarnings("ignore:.*")


def write_tree(root: Path) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{number}.JPEG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader of the README stands: data, a finished quickstart, and downloaded weights, all tiny."""
    here = tmp_path_factory.mktemp("reader")
    before = Path.cwd()
    os.chdir(here)
    try:
        write_tree(here / "ILSVRC2012")
        shutil.copytree(here / "ILSVRC2012" / "val" / "n01440764", here / "some" / "folder")
        photos = ["prepare", "photos", "--out", "data/photos", "--train-per-class", "1", "--val-per-class", "1"]
        assert main(photos) == 0
        for recipe in ("quickstart", *RELEASED.values()):
            arguments = ["fit", "--config", str(ROOT / "conf" / f"{recipe}.yaml"), "+smoke=fastervit"]
            run_dir = f"runs/{recipe}" if recipe == "quickstart" else f"made/{recipe}"
            assert main([*arguments, "--run_dir", run_dir]) == 0
        for file, recipe in RELEASED.items():
            shutil.copy(next((here / "made" / recipe / "weights").glob("*.pth.tar")), here / file)
        shutil.copy(here / "fastervit_0_224_1k.pth.tar", here / "weights.pth.tar")
    finally:
        os.chdir(before)
    return here


def at_smoke_size(tokens: list[str]) -> list[str]:
    """The same command on tiny data, in a run folder of its own."""
    if tokens[0] == "prepare":
        return [*tokens, *SMALL_SETS.get(tokens[1], [])]
    if tokens[0] == "predict":
        return [*tokens, "model=fastervit_tiny", "--data.num_classes", "16", "--data.image_size", "64"]
    extra = ["+smoke=" + next(smoke_group(Path(token).stem) for token in tokens if token.endswith(".yaml"))]
    continues = "--ckpt_path" in tokens
    if tokens[0] == "fit" and "-m" not in tokens and not continues:
        extra += ["--run_dir", f"runs/readme-{abs(hash(tuple(tokens)))}"]
    return [*tokens, *extra]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tokens = shlex.split(command, comments=True)[3:]
    tokens = [str(ROOT / token) if token.startswith("conf/") else token for token in tokens]
    if "-m" in tokens or "logger=wandb" in tokens:  # W&B leaves threads behind, with which later workers can't fork
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-m", "cli", *at_smoke_size(tokens)]
        code = subprocess.run(line, env=environment, check=False).returncode
    else:
        try:
            code = main(at_smoke_size(tokens))
        except SystemExit as leaving:  # --print_config
            code = leaving.code or 0
    assert code == 0, capsys.readouterr()


def test_predictions_are_written(folder):
    table = (folder / "runs" / "predict" / "predictions.csv").read_text().splitlines()
    assert table[0] == "key,rank,class,class_name,probability"
    assert len(table) == 1 + 2 * 5  # two images, five classes each


def test_the_python_example_runs(tmp_path, monkeypatch):
    import timm

    import restrike.models  # noqa: F401 registers FasterViT
    from restrike.checkpoints import save_released

    monkeypatch.chdir(tmp_path)
    save_released("fastervit_0_224_1k.pth.tar", timm.create_model("faster_vit_0_224"))
    scope: dict = {}
    exec(next(block for language, block in BLOCKS if language == "python"), scope)
    maps = scope["features"].eval()(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape[-2:]) for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = sorted(set(re.findall(r"`make ([a-z0-9-]+)`|^make ([a-z]+)", README, re.MULTILINE)))
    names = {a or b for a, b in targets}
    assert {"quickstart", "test", "help", "fastervit-0"} <= names
    for name in names:
        assert re.search(rf"^{name}:.*## ", makefile, re.MULTILINE), f"make {name}: no such target"


def test_links_of_the_readme_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
