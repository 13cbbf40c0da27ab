"""Mistakes in a command line or a config: one message that names the mistake, status 2, no traceback, nothing run."""

import logging
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.__main__ import main
from faults.cases import case

TINY = str(Path(__file__).resolve().parents[1] / "cli" / "recipes" / "conf" / "tiny.yaml")
PROMISE = "status 2, one message that names it, no traceback, nothing runs"
pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice about its own demo model

Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a command line in a fresh folder: (status, what it printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESTRIKE_TRACEBACK", raising=False)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning keeps an earlier test's closed stderr

    def call(*argv: str) -> tuple[int, str]:
        try:
            status = main(list(argv))
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        out, err = capfd.readouterr()
        return status, out + err

    return call


def assert_refused(result: tuple[int, str], expected: str) -> None:
    status, text = result
    assert status == 2, text
    assert expected in text
    assert "Traceback" not in text
    assert not Path("runs").exists()


MISTAKES = {
    "a misspelt option": (["--trainer.max_epcohs", "2"], "trainer.max_epochs"),
    "a misspelt model argument": (["--model.learning_rat", "0.1"], "learning_rate"),
    "a value of the wrong type": (["--trainer.max_epochs", "many"], "max_epochs"),
    "an unknown choice of a group": (["model=huge"], "model/huge"),
    "a misspelt group": (["modle=wide"], "model"),
    "an override of a missing key": (["model.init_args.out_dims.x=3"], "out_dims"),
    "a checkpoint that is not there": (["--ckpt_path", "lost.ckpt"], "lost.ckpt"),
    "--ckpt_path last without a run": (["--ckpt_path", "last"], "last"),
    "weights given as a run's checkpoint": (["--ckpt_path", "weights.pth"], "weights.pth"),
    "a class outside the registry": (["--model", "os.system"], "os.system"),
    "a callback outside the registry": (["--callbacks.x", "subprocess.Popen"], "subprocess"),
    "a bare word": (["fast"], "fast"),
}


@case("config", "{mistake}", promise=PROMISE)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line(mistake: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    options, expected = MISTAKES[mistake]
    assert_refused(cli("fit", "--config", TINY, *options), expected)


FILES = {
    "a file that is no YAML": ("trainer: [1, 2", "mine.yaml"),
    "a file that is a list": ("- trainer", "mine.yaml"),
    "a misspelt key in a file": ("trainer:\n  max_epoch: 2\n", "max_epochs"),
    "an interpolation to nothing": ("trainer:\n  max_epochs: ${vars.epochs}\n", "vars.epochs"),
    "a file that is binary": ("\x00\xff", "mine.yaml"),
    "a YAML tag that would call Python": ("x: !!python/object/apply:os.system ['touch mark']\n", "mine.yaml"),
}


@case("config", "{mistake}", promise=PROMISE)
@pytest.mark.parametrize("mistake", FILES)
def test_a_mistake_in_a_file(mistake: str, cli: Cli, tmp_path: Path) -> None:
    content, expected = FILES[mistake]
    (tmp_path / "mine.yaml").write_text(content, encoding="latin-1")
    assert_refused(cli("fit", "--config", TINY, "--config", "mine.yaml"), expected)
    assert not (tmp_path / "mark").exists()


@case("config", "a config file that is not there", promise=PROMISE)
def test_a_missing_file_names_the_nearest(cli: Cli) -> None:
    assert_refused(cli("fit", "--config", "conf/fastervit_00.yaml"), "conf/fastervit_0.yaml")


@case("config", "a freezing pattern without a match", promise=PROMISE)
def test_a_freezing_pattern_without_a_match(cli: Cli) -> None:
    status, text = cli(
        "fit", "--config", TINY, "--callbacks.freeze", "callbacks.staged_freezing.StagedFreezing",
        "--callbacks.freeze.stages", '{"0": ["leyer.*"]}',
    )  # fmt: skip
    assert status == 2, text
    assert "no parameter matches 'leyer.*'" in text
    assert "l1.weight" in text
    assert "Traceback" not in text


@case("config", "devices that contradict the launcher's", promise=PROMISE)
def test_devices_that_contradict_torchrun(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "32"}.items():
        monkeypatch.setenv(name, value)
    assert_refused(cli("fit", "--config", TINY, "--trainer.devices", "4"), "--trainer.devices 8 --trainer.num_nodes 4")


@case("config", "sbatch without srun", promise=PROMISE)
def test_sbatch_without_srun(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert_refused(cli("fit", "--config", TINY, "--trainer.devices", "8"), "srun")


@case("config", "a MASTER_PORT that is taken", promise="a line at the start names it and the mend")
def test_a_port_that_is_taken(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("cli.main.rank_zero_info", told.append)
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        monkeypatch.setenv("MASTER_PORT", str(held.getsockname()[1]))
        status, text = cli("fit", "--config", TINY)
    assert status == 0, text
    assert [line for line in told if line.startswith("careful: MASTER_PORT") and "is taken" in line and "unset" in line]


@case("config", "a second run into the same folder", promise="status 2; the first run's files are untouched")
def test_a_second_run_into_the_same_folder(cli: Cli, tmp_path: Path) -> None:
    status, text = cli("fit", "--config", TINY)
    assert status == 0, text
    before = {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    status, text = cli("fit", "--config", TINY)
    assert status == 2
    assert "holds an earlier run" in text
    assert before == {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()}
