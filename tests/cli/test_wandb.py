"""W&B: every flag has its place, offline asks nobody, a run folder is one W&B run, and no artefact holds a secret."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cli import loggers
from cli.secrets import hide_secrets

PROJECT = Path(__file__).resolve().parents[2]
RECIPES = Path(__file__).parent / "recipes" / "conf"
CANARY = "canary0123456789"
SECRETS = {
    "WANDB_API_KEY": f"{CANARY}wandb{'k' * 19}",
    "HF_TOKEN": f"{CANARY}hf",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}aws",
    "AWS_SESSION_TOKEN": f"{CANARY}session",
}
CHECKPOINT = ["--callbacks.checkpoint", "callbacks.checkpoint.Checkpoint", "--trainer.enable_checkpointing", "true"]


def fit(folder: Path, *argv: str, **env: str) -> str:
    """A real fit in a process of its own, where W&B's threads trouble nobody; what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(PROJECT), "HOME": str(folder), "NETRC": str(folder / "netrc"), **env}
    conf = folder / "conf"  # the tests' recipe with the project's own loggers
    shutil.copytree(RECIPES, conf, dirs_exist_ok=True)
    shutil.copytree(PROJECT / "conf" / "logger", conf / "logger", dirs_exist_ok=True)
    command = [sys.executable, "-m", "cli", "fit", "--config", "conf/tiny.yaml", "--run_dir", "runs/a", *argv]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def artefacts(run: Path) -> list[Path]:
    return [file for file in run.rglob("*") if file.is_file()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a run with every flag of the guide was started offline, with secrets about, and then resumed."""
    folder = tmp_path_factory.mktemp("wandb")
    flags = ["--wandb", "--wandb_project", "proj", "--wandb_group", "grp", "--wandb_job_type", "job"]
    flags += ["--wandb_entity", "ent", "--wandb_mode", "offline", "--trainer.log_every_n_steps", "1"]
    url = f"https://user:{CANARY}@host/data?signature={CANARY}"
    fit(folder, *flags, *CHECKPOINT, "--vars.url", url, "--vars.token", SECRETS["HF_TOKEN"], **SECRETS)
    again = ["--wandb_mode", "offline", *CHECKPOINT, "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    fit(folder, *again, **SECRETS)
    return folder / "runs" / "a"


def test_every_flag_of_the_guide_reaches_the_run(runs):
    config = yaml.safe_load((runs / "config_fit.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2  # of the resumed run
    first = sorted((runs / "wandb").glob("offline-run-*"))[0]
    content = next(first.glob("*.wandb")).read_bytes()
    for value in (b"proj", b"grp", b"job", b"ent", b"provenance"):
        assert value in content
    assert not (first / "files" / "wandb-metadata.json").exists()


def test_a_resumed_run_goes_on_in_the_same_wandb_run(runs):
    run_id = (runs / loggers.WANDB_ID).read_text().strip()
    folders = [folder.name.rpartition("-")[2] for folder in (runs / "wandb").glob("offline-run-*")]
    assert folders == [run_id, run_id]
    config = yaml.safe_load((runs / "config_fit.yaml").read_text())
    assert config["logger"]["wandb"]["init_args"]["id"] is None  # that config starts another run elsewhere
    assert config["logger"]["wandb"]["init_args"]["resume"] == "allow"


def test_no_artefact_holds_a_secret(runs):
    files = artefacts(runs)
    assert {".wandb", ".ckpt", ".yaml", ".json", ".csv", ".log"} <= {file.suffix for file in files}
    assert [str(file) for file in files if CANARY.encode() in file.read_bytes()] == []
    command = json.loads((runs / "provenance_fit.json").read_text())["command"]
    assert "--ckpt_path" in command


def test_without_a_login_it_logs_offline_and_says_so_in_one_line(tmp_path):
    text = fit(tmp_path, "--wandb", "--trainer.log_every_n_steps", "1")
    assert text.count("no W&B login found, logging offline") == 1
    assert list((tmp_path / "runs" / "a" / "wandb").glob("offline-run-*"))
    assert (tmp_path / "runs" / "a" / "metrics" / "version_0" / "metrics.csv").is_file()


def test_where_it_is_not_installed_the_table_goes_on_alone(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['wandb'] = None\n")
    text = fit(tmp_path, "--wandb", "--trainer.log_every_n_steps", "1", PYTHONPATH=f"{PROJECT}{os.pathsep}{tmp_path}")
    assert text.count("wandb is not installed") == 1
    assert (tmp_path / "runs" / "a" / "metrics" / "version_0" / "metrics.csv").is_file()
    assert not (tmp_path / "runs" / "a" / "wandb").exists()


@pytest.fixture
def config(tmp_path, monkeypatch) -> dict:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(loggers, "has_wandb_key", lambda: True)
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": False}}
    return {"run_dir": str(tmp_path), "logger": {"csv": None, "wandb": wandb}}


def test_a_run_id_is_the_given_one_or_the_folders_or_new(config, tmp_path):
    arguments = config["logger"]["wandb"]["init_args"]
    loggers.settle_loggers(config)
    new = arguments.pop("id")
    assert len(new) == 8
    (tmp_path / loggers.WANDB_ID).write_text("before\n")
    loggers.settle_loggers(config)
    assert (arguments["id"], arguments["resume"]) == ("before", "allow")
    arguments |= {"id": "mine", "resume": "must"}
    loggers.settle_loggers(config)
    assert (arguments["id"], arguments["resume"]) == ("mine", "must")
    loggers.keep_wandb_id(config, tmp_path)
    assert loggers.saved_wandb_id(tmp_path) == "mine" and arguments["id"] is None


@pytest.mark.parametrize(
    ("arguments", "env", "mode"),
    [
        ({}, None, "online"),
        ({"offline": True}, None, "offline"),
        ({"mode": "offline"}, None, "offline"),
        ({"mode": "disabled"}, "online", "disabled"),
        ({}, "dryrun", "offline"),
        ({}, "disabled", "disabled"),
    ],
)
def test_only_online_asks_for_a_login(config, arguments, env, mode, monkeypatch):
    asked: list[bool] = []
    monkeypatch.setattr(loggers, "has_wandb_key", lambda: bool(asked.append(True)))
    monkeypatch.setattr(loggers, "rank_zero_info", lambda _: None)
    if env:
        monkeypatch.setenv("WANDB_MODE", env)
    logger = config["logger"]["wandb"]
    logger["init_args"] |= arguments
    assert loggers.wandb_mode(logger) == mode
    loggers.settle_loggers(config)
    assert bool(asked) == (mode == "online")
    assert loggers.wandb_mode(logger) == ("offline" if mode == "online" else mode)


def test_disabled_starts_nothing():
    program = (
        "from lightning.pytorch.loggers import WandbLogger; logger = WandbLogger(mode='disabled');"
        "logger.log_metrics({'x': 1.0}); import os; print(sorted(os.listdir('.')))"
    )
    folder = PROJECT / "tests" / "cli" / "recipes"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("['conf']"), done.stdout + done.stderr


def test_only_wandb_is_told_what_ran():
    class WandbLogger(SimpleNamespace):
        def log_hyperparams(self, content: dict) -> None:
            self.content = content

    told, table = WandbLogger(), SimpleNamespace()
    loggers.tell_wandb([table, told], {"config": 1})
    assert told.content == {"config": 1} and not vars(table)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pw@host/a", "https://***@host/a"),
        ("pipe:curl s3://key@bucket/x | cat", "pipe:curl s3://***@bucket/x | cat"),
        ("https://host/a?X-Amz-Signature=abc&b=1", "https://host/a?***"),
        ("token is 0123456789", "token is ***"),
        ("https://host/a", "https://host/a"),
        ("mail@host and a?b", "mail@host and a?b"),
        ("short in shorter", "short in shorter"),
    ],
)
def test_credentials_are_hidden_wherever_they_stand(text, shown):
    env = {"HF_TOKEN": "0123456789", "X_SECRET": "short", "PATH": "/a/path/of/folders"}
    assert hide_secrets({"a": [text, 1, None]}, env) == {"a": [shown, 1, None]}
