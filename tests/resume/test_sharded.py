"""FSDP2's one-file checkpoints: written whole and checked by the project's own checkpoint IO, resumed bitwise."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from callbacks import AtomicCheckpointIO, RngState
from distributed import run_ranks
from restrike.checkpoints import atomic, safe_load
from restrike.checkpoints.manifest import verify
from resume.harness import differences
from training_tools import ToyData, toy_module, toy_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # torch's own about CPU meshes
VIT = {"model_name": "test_vit", "model_args": {"img_size": 32, "depth": 2, "proj_drop_rate": 0.2}}


def fit(folder: Path, end: str, *callbacks: Any, ckpt_path: Path | None = None, sharded: bool = True) -> None:
    """Two epochs of four steps on this rank; what it ended with is in the file `end`."""
    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    trainer = toy_trainer(
        folder,
        devices=2,
        strategy=strategy,
        callbacks=[RngState(), *callbacks],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=bool(callbacks),
    )
    trainer.fit(toy_module(**VIT, schedule="cosine"), datamodule=ToyData(), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / end)


def scenario(rank: int, name: str) -> None:
    folder = Path(name)
    fit(folder, "plain.ckpt", ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1))
    fit(folder, "resumed.ckpt", ckpt_path=folder / "step=3.ckpt")
    fit(folder, "ddp.ckpt", ckpt_path=folder / "step=3.ckpt", sharded=False)


def test_a_sharded_run_resumes_bitwise_from_one_checked_file_and_goes_on_under_ddp() -> None:
    with tempfile.TemporaryDirectory() as name:
        run_ranks(scenario, name)
        folder = Path(name)
        verify(folder / "step=3.ckpt")
        assert atomic.newest_valid(folder, "step=*.ckpt") is not None
        plain, resumed, ddp = (safe_load(folder / f"{run}.ckpt") for run in ("plain", "resumed", "ddp"))
        assert not list(folder.glob("*.tmp*"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert differences(resumed[part], plain[part], part) == []
    assert resumed["callbacks"]["RngState"]["ranks"][1]["torch"].shape
    torch.testing.assert_close(ddp["state_dict"], plain["state_dict"], rtol=1e-3, atol=1e-4)
