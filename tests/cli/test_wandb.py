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
from cli.arguments import split
from cli.compose import compose_all
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
    flags += ["--wandb_entity", "ent", "--wandb_mode", "offline", "--wandb_resume_id", "theirs"]
    flags += ["--trainer.log_every_n_steps", "1"]
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
    assert run_id == "theirs"
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


# A tensorboardX that writes what it is told into a text file.
WRITER = """
import os
class SummaryWriter:
    def __init__(self, log_dir: str = "", flush_secs: int = 120):
        os.makedirs(log_dir, exist_ok=True)
        self.file = open(f"{log_dir}/events.txt", "a", buffering=1)
    def add_scalar(self, *values):
        print(*values, file=self.file)
    def __getattr__(self, name):
        return lambda *_, **__: None
"""


def test_where_it_is_not_installed_tensorboard_takes_over_and_every_flag_still_parses(tmp_path):
    packages = tmp_path / "packages"
    (packages / "tensorboardX").mkdir(parents=True)
    (packages / "tensorboardX" / "__init__.py").write_text(WRITER)
    (packages / "tensorboardX-2.6.dist-info").mkdir()
    (packages / "tensorboardX-2.6.dist-info" / "METADATA").write_text("Name: tensorboardX\nVersion: 2.6\n")
    (packages / "sitecustomize.py").write_text("import sys\nsys.modules.update(wandb=None, tensorboard=None)\n")
    flags = ["--wandb_project", "p", "--wandb_group=g", "--wandb_job_type", "j", "--wandb_entity", "e"]
    flags += ["--wandb_mode", "offline", "--wandb_resume_id", "r", "--trainer.log_every_n_steps", "1"]
    text = fit(tmp_path, *flags, PYTHONPATH=f"{PROJECT}{os.pathsep}{packages}")
    assert text.count("logger.wandb: wandb not installed (pip install wandb): TensorBoard and the table") == 1
    run = tmp_path / "runs" / "a"
    assert (run / "metrics" / "version_0" / "metrics.csv").is_file()
    assert "lr" in (run / "tensorboard" / "version_0" / "events.txt").read_text()
    assert not (run / "wandb").exists()


@pytest.mark.parametrize("group", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_is_left_out_with_its_options_and_one_line(group, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(loggers, "rank_zero_info", told.append)
    monkeypatch.setattr(loggers, "is_installed", lambda package: False)
    composed = compose_all([str(PROJECT / "conf" / "quickstart.yaml")], [f"logger={group}"])
    options = [f"--logger.{group}.name", "x", "--trainer.max_epochs", "2", f"--logger.{group}.version=7"]
    arguments = split(["fit", *options, f"--logger.{group}ish.a=1"])
    loggers.drop_missing_loggers(arguments, composed)
    assert list(composed.config["logger"]) == ["csv"]
    assert arguments.options == ["--trainer.max_epochs", "2", f"--logger.{group}ish.a=1"]
    (line,) = told
    assert f"logger.{group}: {group}" in line and "(metrics.csv) goes on alone" in line


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
