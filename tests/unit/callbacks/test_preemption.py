"""`Preemption` beside Lightning's own handlers, SLURM and Lightning's own launcher."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _BatchProgress

from callbacks import preemption
from callbacks.preemption import EXIT_PREEMPTED, PreemptedError, Preemption
from resume.harness import ToyData, ToyModule

ROOT = Path(__file__).resolve().parents[3]


def trainer(**arguments: Any) -> Trainer:
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, **arguments)


def test_the_private_names_of_lightning_still_exist() -> None:
    one = trainer(enable_checkpointing=False)
    loop = one.fit_loop.epoch_loop
    assert callable(loop._broadcast_sigterm_tensor)
    assert callable(loop._num_ready_batches_reached)
    assert callable(loop._should_check_val_fx)
    assert hasattr(one.fit_loop, "_data_fetcher")
    assert isinstance(loop.val_loop.batch_progress, _BatchProgress)


def test_lightning_neither_broadcasts_at_each_batch_nor_requeues_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(enable_checkpointing=False)
    environment = SLURMEnvironment(auto_requeue=True)
    monkeypatch.setattr(one.strategy, "cluster_environment", environment, raising=False)
    broadcasts: list[Any] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *args, **kwargs: broadcasts.append(args))
    Preemption().setup(one, ToyModule(), "fit")
    one.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert broadcasts == []
    assert environment.auto_requeue is False


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_handlers_are_ours_while_training_and_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    callback = Preemption(path="last.ckpt")
    one = trainer(callbacks=[callback], max_steps=3, enable_model_summary=False, default_root_dir=tmp_path)
    seen: list[Any] = []
    module = ToyModule()
    module.on_train_batch_start = lambda batch, batch_idx: seen.append(signal.getsignal(signal.SIGTERM))
    one.fit(module, datamodule=ToyData())
    assert seen == [callback._note] * 3
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_real_signal_ends_fit_with_the_status(tmp_path: Path) -> None:
    module = ToyModule()
    module.on_train_batch_start = lambda batch, batch_idx: os.kill(os.getpid(), signal.SIGTERM) if batch_idx == 2 else 0
    one = trainer(callbacks=[Preemption()], max_epochs=1, enable_model_summary=False, default_root_dir=tmp_path)
    with pytest.raises(PreemptedError) as caught:
        one.fit(module, datamodule=ToyData())
    assert caught.value.code == EXIT_PREEMPTED == 75
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


JOBS = {
    "a job": ({"SLURM_JOB_ID": "12"}, ["scontrol", "requeue", "12"]),
    "an array's task": (
        {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"},
        ["scontrol", "requeue", "12_3"],
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_requeue_names_the_job(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, expected = JOBS[job]
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    commands: list[list[str]] = []

    def note(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(preemption.subprocess, "run", note)
    preemption._requeue()
    assert commands == [expected]


def test_requeue_outside_slurm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.warns(UserWarning, match="no SLURM job"):
        preemption._requeue()


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"signals": ("SIGWHAT",)}])
def test_impossible_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.preemption"):
        Preemption(**arguments)


SCRIPT = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from lightning.pytorch import Callback, Trainer
from callbacks.checkpoint_io import AtomicCheckpointIO
from callbacks.preemption import Preemption
from resume.harness import ToyData, ToyModule

class Ask(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, max_epochs=100, enable_progress_bar=False,
    default_root_dir=sys.argv[1], callbacks=[Ask(), Preemption(every_n_steps=2)], plugins=[AtomicCheckpointIO()],
    use_distributed_sampler=False,
).fit(ToyModule(), datamodule=ToyData())
"""


@pytest.mark.slow
def test_processes_that_lightning_started_leave_in_good_order(tmp_path: Path) -> None:
    """Lightning kills the main process if a child's status is not 0: only the main one's says 75."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(paths=[str(ROOT), str(ROOT / "tests")])))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == EXIT_PREEMPTED, done.stderr
    assert "Forcefully" not in done.stderr
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] <= 8
