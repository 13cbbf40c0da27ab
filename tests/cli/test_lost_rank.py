"""A rank that is killed in mid-step, under both launchers: the job ends soon and says which rank it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from cli.compose import compose_all

PROJECT = Path(__file__).resolve().parents[2]
RECIPE = Path(__file__).parent / "recipes" / "conf" / "tiny.yaml"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LIMIT_S = 60  # from the kill, which comes at the fourth step, to the end of every process


class KillRank(Callback):
    """SIGKILL within the backward pass of the fourth step, of one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and trainer.global_rank == self.rank:
            print(f"killing {os.getpid()}", flush=True)
            parameter = next(pl_module.parameters())
            parameter.register_hook(lambda grad: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize(("launcher", "rank"), [("torchrun", 1), ("lightning", 0), ("lightning", 1)])
def test_the_job_ends_and_names_the_rank(launcher: str, rank: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        *(TORCHRUN if launcher == "torchrun" else []),
        "-m",
        "cli",
        "fit",
        "--config",
        str(RECIPE),
    ]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--vars.batches", "8"]
    command += ["--callbacks.watch", "callbacks.RankWatch", "--allow_class_path", "test_lost_rank"]
    command += ["--callbacks.kill", "test_lost_rank.KillRank", "--callbacks.kill.rank", str(rank)]
    paths = [str(PROJECT), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # waits until no process of the job holds its output open
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        timeout=240, check=False,
    )  # fmt: skip
    text = done.stdout
    assert done.returncode != 0
    pid = re.search(r"killing (\d+)", text)
    assert pid, text
    assert re.search(rf"error: rank {rank} \(\S+, pid {pid[1]}\) is gone .*--ckpt_path last", text), text


@pytest.mark.parametrize("group", ["cpu", "gpu", "ddp", "ddp_1x8", "ddp_4x8", "slurm", "fsdp"])
def test_every_trainer_group_watches_its_ranks(group: str) -> None:
    config = compose_all([str(PROJECT / "conf" / "quickstart.yaml")], [f"trainer={group}"]).config
    assert {"class_path": "callbacks.RankWatch"} in config["trainer"]["callbacks"]
