"""How long the command line takes to begin: against LightningCLI with the same classes and the same config.

    python -m benchmarks cold_start

Whole processes, wall clock, in turn. `--help` is ours and the peer's own. "Config to first step" trains one step of the
quickstart on its digits, from the start of the process to its end; the peer gets the config as ours resolved it, with
its callbacks as a list. What it does not do: compose, check names, keep a run folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import Row, compare, environment, record
from cli.compose import compose_all
from restrike.data_prep.embedded import prepare_digits
from restrike.data_prep.pack import PackOptions

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python -m benchmarks cold_start"
PEER = """
from lightning.pytorch.cli import LightningCLI
import callbacks, datamodules, lightning_modules
LightningCLI(lightning_modules.ClassificationModule, datamodules.ImageNetDataModule, save_config_callback=None,
             seed_everything_default=0, auto_configure_optimizers=False)
"""
ONE_STEP = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]


class Commands:
    """Command lines of ours and of the peer, and a folder for what they write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs = 0
        prepare_digits(folder / "digits", PackOptions("digits", {"train": 1, "validation": 1}))
        self._peer = folder / "peer.py"
        self._peer.write_text(PEER)
        self._config = folder / "plain.yaml"
        self._config.write_text(yaml.safe_dump(self._plain_config()))

    def ours(self, *arguments: str) -> None:
        self._run([sys.executable, "-m", "cli", *arguments])

    def peer(self, *arguments: str) -> None:
        self._run([sys.executable, str(self._peer), *arguments])

    def our_step(self) -> None:
        data, run = ["--data.data", str(self.folder / "digits")], ["--run_dir", self._new_folder()]
        self.ours("fit", "--config", "conf/quickstart.yaml", *data, *run, *ONE_STEP)

    def peer_step(self) -> None:
        self.peer("fit", "--config", str(self._config), "--trainer.default_root_dir", self._new_folder(), *ONE_STEP)

    def _new_folder(self) -> str:
        self._runs += 1
        return str(self.folder / f"run{self._runs}")

    def _plain_config(self) -> dict[str, Any]:
        """The quickstart's, resolved, as LightningCLI takes it where the two classes are given in code."""
        from omegaconf import OmegaConf

        composed = OmegaConf.create(compose_all(["conf/quickstart.yaml"], []).config)
        config: Any = OmegaConf.to_container(composed, resolve=True)
        trainer = config["trainer"] | {"callbacks": list(config["callbacks"].values()), "logger": False}
        for callback in list(trainer["callbacks"]):
            if callback["class_path"].rpartition(".")[2] in ("LearningRateMonitor", "Curves", "Publish"):
                trainer["callbacks"].remove(callback)  # they need a logger or the run folder
        data = config["data"]["init_args"] | {"data": str(self.folder / "digits")}
        return {"seed_everything": 0, "model": config["model"]["init_args"], "data": data, "trainer": trainer}

    def _run(self, command: list[str]) -> None:
        environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def main() -> None:
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(Path(folder))
        cases = {
            "Cold start: --help": (lambda: commands.ours("--help"), lambda: commands.peer("--help")),
            "Cold start: config to the end of the first step": (commands.our_step, commands.peer_step),
        }
        for name, (ours, peer) in cases.items():
            timing = compare(ours, peer, rounds=7, warmup=1, min_round_s=0.0)
            checked = "both end with exit code 0"
            row = Row.of(timing, name=name, peer_name="LightningCLI", checked=checked, command=COMMAND)
            record(row, where=environment("lightning"))


if __name__ == "__main__":
    main()
