"""`python -m cli doctor`: what would go wrong is found before the run, and nothing is started."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli.__main__ import main
from restrike.checkpoints import atomic

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "conf" / "vit_finetune.yaml")
Doctor = Callable[..., tuple[int, str]]
pytestmark = pytest.mark.filterwarnings("ignore:.*")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    assert main(["prepare", "photos", "--out", str(folder), "--train-per-class", "2", "--val-per-class", "1"]) == 0
    return folder


@pytest.fixture
def doctor(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Runs it on the smoke form of a recipe; (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)

    def run(*argv: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main(["doctor", "--config", RECIPE, "+smoke=vit", "--data.data", str(photos), "--run_dir", "run", *argv])
        return code, capfd.readouterr().out

    return run


def test_a_run_that_will_work_has_no_problem_and_nothing_is_written(doctor, tmp_path):
    code, text = doctor()
    assert code == 0, text
    assert "0 problem(s)" in text
    assert "train: 32 images of 16 classes" in text
    assert "1 ranks x 4: 4 images a step, 8 steps an epoch" in text
    assert "8 of training for 1 workers" in text
    assert "0.0 M trained parameters" in text
    assert "run is new" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--data.data", "nowhere"], "PROBLEM  data: "),
        (["--data.num_classes", "7"], "PROBLEM  data: "),
        (["--data.batch_size_per_device", "64"], "PROBLEM  batch: 1 ranks x 64"),
        (["--model.pretrained", "lost.safetensors"], "PROBLEM  pretrained: lost.safetensors does not exist"),
        (["--model.model_name", "vit_huuge"], "PROBLEM  model: unknown model_name 'vit_huuge'"),
    ],
)
def test_what_would_stop_the_run_is_a_problem(doctor, argv, expected):
    code, text = doctor(*argv)
    assert code == 1, text
    assert expected in text


def test_too_many_workers_and_nodes_without_a_launcher_are_warned_of(doctor):
    code, text = doctor("--data.num_workers", "4000", "--trainer.num_nodes", "2")
    assert code == 0, text
    assert "warning  cores: 1 processes x (4000 workers + 1)" in text
    assert "warning  launch: the recipe asks for 2 nodes" in text
    assert "8 of training for 8000 workers (fewer than workers" in text


def test_a_shard_that_is_gone_is_named(doctor, photos, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    shard = next(copy.glob("*train*.tar"))
    shard.unlink()
    code, text = doctor("--data.data", str(copy))
    assert code == 1
    assert shard.name in text


def test_the_newest_whole_checkpoint_is_found_and_a_damaged_one_named(doctor, tmp_path):
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    for step in (1, 2):
        atomic.save({"step": torch.tensor(step)}, last)
    code, text = doctor()
    assert code == 0 and "last.ckpt is whole: --ckpt_path last goes on from it" in text
    last.write_bytes(last.read_bytes()[:100])
    code, text = doctor()
    assert "warning  run folder: passing over a checkpoint" in text
    assert "last-previous.ckpt is whole" in text
    shutil.rmtree(last.parent)
    (tmp_path / "run" / "config_fit.yaml").write_text("run_dir: run\n")
    code, text = doctor()
    assert code == 1 and "PROBLEM  run folder: run holds a run without a checkpoint" in text


@pytest.mark.parametrize(
    ("flags", "key", "expected"),
    [
        (["--wandb_mode", "offline"], None, "logger.wandb: offline: `wandb sync` later; goes on in the W&B run abc"),
        (["--wandb_mode", "disabled"], None, "logger.wandb: disabled"),
        (["--wandb"], "k" * 40, "logger.wandb: online, a login was found"),
    ],
)
def test_the_state_of_wandb_is_told(doctor, flags, key, expected, monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb_id.txt").write_text("abc\n")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    code, text = doctor(*flags)
    assert code == 0 and expected in text


def test_it_needs_the_line_of_a_fit(capsys):
    assert main(["doctor"]) == 2
    assert "--config" in capsys.readouterr().err
    assert main(["doctor", "--help"]) == 0
