"""`python -m cli` as people use it: composed, checked, run; and what it says of mistakes."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Union

import pytest
import yaml

from cli.__main__ import main

PROJECT = Path(__file__).resolve().parents[2]
TINY = str(Path(__file__).parent / "recipes" / "conf" / "tiny.yaml")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*"),  # Lightning's advice about its own demo model
]


@pytest.fixture
def cli(capfd, tmp_path, monkeypatch):
    """Runs a command line in a fresh folder; returns (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESTRIKE_TRACEBACK", raising=False)
    # Lightning logs to the stderr of the test that imported it first, which is closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*argv: str) -> tuple[int, str]:
        try:
            code = main(list(argv))
        except SystemExit as leaving:
            code = leaving.code
        out, err = capfd.readouterr()
        return code or 0, out + err

    return run


def printed_config(cli, *argv: str) -> dict:
    code, text = cli("fit", "--config", TINY, *argv, "--print_config")
    assert code == 0, text
    return yaml.safe_load(text[text.index("seed_everything") :])


def test_print_config_shows_the_whole_resolved_recipe(cli):
    config = printed_config(cli)
    assert config["trainer"]["limit_train_batches"] == 2  # an interpolation
    assert config["trainer"]["gradient_clip_val"] is None  # a default of the signature
    assert config["model"]["init_args"] == {"out_dim": 10, "learning_rate": 0.02}
    assert config["logger"]["csv"]["init_args"]["save_dir"] == "runs/tiny"


def test_shell_options_beat_overrides_and_interpolations_follow(cli):
    config = printed_config(
        cli, "model=wide", "model.init_args.learning_rate=0.1", "--model.learning_rate", "0.3", "--vars.batches", "5",
        "~callbacks.timer", "--callbacks.lr_monitor.logging_interval", "epoch", "--run_dir", "elsewhere",
    )  # fmt: skip
    assert config["model"]["init_args"] == {"out_dim": 20, "learning_rate": 0.3}
    assert config["trainer"]["limit_train_batches"] == 5
    assert set(config["callbacks"]) == {"lr_monitor"}
    assert config["callbacks"]["lr_monitor"]["init_args"]["logging_interval"] == "epoch"
    assert config["logger"]["csv"]["init_args"]["save_dir"] == "elsewhere"


def test_a_callback_can_be_switched_off_on_the_command_line(cli):
    assert printed_config(cli, "--callbacks.timer", "null")["callbacks"]["timer"] is None


def test_a_run_writes_its_config_and_provenance_and_the_config_runs_again(cli, tmp_path):
    code, text = cli("fit", "--config", TINY, "--run_dir", "runs/a", "model=wide")
    assert code == 0, text
    run = tmp_path / "runs" / "a"
    provenance = json.loads((run / "provenance_fit.json").read_text())
    assert provenance["overrides"] == ["model=wide"]
    assert provenance["group_choices"]["model"] == "wide"
    assert "torch" in provenance["packages"]
    saved = yaml.safe_load((run / "config_fit.yaml").read_text())
    assert "ckpt_path" not in saved and saved["logger"]["csv"]["init_args"]["save_dir"] == "${run_dir}"

    code, text = cli("fit", "--config", str(run / "config_fit.yaml"), "--run_dir", "runs/b")
    assert code == 0, text
    again = yaml.safe_load((tmp_path / "runs" / "b" / "config_fit.yaml").read_text())
    assert again | {"run_dir": None} == saved | {"run_dir": None}
    assert (tmp_path / "runs" / "b" / "metrics").is_dir()


def test_an_earlier_run_is_not_written_over(cli, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config_fit.yaml").write_text("run_dir: runs/a\n")
    code, text = cli("fit", "--config", TINY, "--run_dir", "runs/a")
    assert code == 2 and "holds an earlier run" in text and "--ckpt_path last" in text


MISTAKES = {
    "misspelt argument": (
        ["--model.learning_ratee", "1"],
        ["learning_ratee", "given on the command line", "learning_rate'"],
    ),
    "misspelt trainer key": (["--trainer.devcies", "2"], ["trainer.devcies", "Did you mean 'trainer.devices'?"]),
    "wrong type": (["--trainer.max_epochs", "many"], ["trainer.max_epochs", "int", "'many'"]),
    "wrong literal": (
        ["--callbacks.lr_monitor.logging_interval", "never"],
        ["logging_interval", "'step', 'epoch'", "'never'"],
    ),
    "unknown group": (["modle=wide"], ["modle", "Did you mean 'model'?"]),
    "unknown choice": (["model=wid"], ["model/wid", "narrow", "wide"]),
    "unresolved interpolation": (["--vars.x", "${nope.y}"], ["nope.y"]),
    "class outside the registry": (["model.class_path=os.system"], ["os.system", "--allow_class_path os"]),
    "class outside the registry, as an option": (["--model", "os.system"], ["os.system", "--allow_class_path"]),
    "unknown strategy": (["--trainer.strategy", "ddpp"], ["ddpp"]),
    "no checkpoint yet": (["--ckpt_path", "last"], ["no valid last*.ckpt", "run fit first"]),
    "missing checkpoint": (["--ckpt_path", "nope.ckpt"], ["nope.ckpt", "does not exist"]),
    "bare word": (["hello"], ["hello"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_message_and_exit_code_2(cli, name):
    argv, expected = MISTAKES[name]
    code, text = cli("fit", "--config", TINY, *argv)
    assert code == 2, text
    assert "Traceback" not in text
    assert text.count("error:") == 1
    for part in expected:
        assert part in text


def test_a_misspelt_key_in_a_file_is_named_with_its_line(cli, tmp_path):
    (tmp_path / "mine.yaml").write_text("trainer:\n  max_epochs: 2\n  max_stepz: 3\n")
    code, text = cli("fit", "--config", TINY, "--config", "mine.yaml")
    assert code == 2
    assert "mine.yaml:3" in text and "Did you mean 'trainer.max_steps'?" in text


def test_missing_config_and_unknown_subcommand_are_named(cli):
    code, text = cli("fit", "--config", "conf/fastervit_00.yaml")
    assert code == 2 and "Did you mean 'conf/fastervit_0.yaml'?" in text
    code, text = cli("fti")
    assert code == 2 and "Did you mean 'fit'?" in text


def test_an_error_of_ours_in_the_middle_of_a_run_is_its_message(cli, monkeypatch):
    from lightning.pytorch.demos.boring_classes import DemoModel

    from callbacks import NonFiniteGradientError

    def fail(*_):
        raise NonFiniteGradientError("gradient norm is nan at step 0")

    monkeypatch.setattr(DemoModel, "training_step", fail)
    code, text = cli("fit", "--config", TINY)
    assert code == 1
    assert "error: gradient norm is nan at step 0" in text and "Traceback" not in text


def test_a_defect_shows_its_traceback(cli, monkeypatch):
    from lightning.pytorch.demos.boring_classes import DemoModel

    def fail(*_):
        raise ValueError("nobody expected this")

    monkeypatch.setattr(DemoModel, "training_step", fail)
    with pytest.raises(ValueError, match="nobody expected this"):
        cli("fit", "--config", TINY)


def test_help_and_version_import_neither_torch_nor_hydra():
    program = (
        "import sys; from cli.__main__ import main; main(['--help']); main(['--version']);"
        "sys.exit(bool({'torch', 'hydra', 'lightning', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prepare" in done.stdout


def test_a_sweep_runs_one_job_per_value(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "cli", "fit", "-m", "--config", TINY, "model.init_args.learning_rate=0.1,0.2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = sorted(tmp_path.glob("runs/sweeps/tiny/*/*/config_fit.yaml"))
    rates = [yaml.safe_load(file.read_text())["model"]["init_args"]["learning_rate"] for file in saved]
    assert rates == [0.1, 0.2]


@pytest.mark.slow
def test_a_sweep_goes_through_submitit(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [
        sys.executable,
        "-m",
        "cli",
        "fit",
        "-m",
        "--config",
        TINY,
        "hydra/launcher=submitit_local",
        "model=narrow,wide",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("runs/sweeps/tiny/*/*/config_fit.yaml"))) == 2


def test_private_names_of_lightning_that_we_rely_on_still_exist():
    from lightning.pytorch.cli import LightningCLI

    assert callable(LightningCLI._parse_ckpt_path)


@pytest.mark.parametrize(("typed", "meant"), [("1", 1), ("1.0", 1.0), ("0.5", 0.5), ("null", None)])
def test_a_count_of_batches_stays_a_count(typed, meant):
    from lightning.pytorch.cli import LightningArgumentParser

    from cli.main import _count_before_share

    parser = LightningArgumentParser()
    parser.add_argument("--limit", type=Union[float, int, None])  # noqa: UP007 the order is what is tested
    _count_before_share(parser)
    found = parser.parse_args([f"--limit={typed}"]).limit
    assert (type(found), found) == (type(meant), meant)
