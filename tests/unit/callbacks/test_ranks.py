"""Two gloo processes: the average, BatchNorm statistics, and a NaN on one rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from callbacks import EMA, MESA, BatchNormSync, FiniteGuard, StepSeed
from distributed import run_ranks
from training_tools import ToyData, differing, toy_module, toy_trainer, weights


def train_on_a_rank(root: Path, *callbacks: Callback, ckpt_path: Path | None = None, **data: Any) -> dict[str, Any]:
    """Final weights of this rank."""
    module = toy_module(model_args={"drop_rate": 0.3 if any(isinstance(c, EMA) for c in callbacks) else 0.0})
    if os.environ["RANK"] == "1":
        torch.nn.init.ones_(module.net.fc.weight)  # DDP's broadcast has to win
    trainer = toy_trainer(
        root,
        callbacks=list(callbacks),
        devices=2,
        strategy="ddp",
        plugins=[TorchElasticEnvironment()],
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    trainer.fit(module, datamodule=ToyData(**data), ckpt_path=ckpt_path)
    return weights(module)


def train_with_average(root: Path, *callbacks: Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Final weights and average of this rank."""
    ema = EMA(0.9)
    behaviours = [MESA(1.0, start_ratio=0.0, schedule_epochs=2), StepSeed(1), ema]
    trained = train_on_a_rank(root, *behaviours, *callbacks, ckpt_path=ckpt_path)
    return {"weights": trained, "average": weights(ema.shadow())}


def scenarios(rank: int, folder: str) -> dict[str, Any]:
    """All runs in one pair of processes, since starting a pair takes longer than training."""
    root, guard = Path(folder), FiniteGuard()
    return {
        "plain": train_with_average(root, ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1)),
        "resumed": train_with_average(root, ckpt_path=root / "step=2.ckpt"),
        "synced": train_with_average(root, BatchNormSync()),
        "poisoned": train_on_a_rank(root, guard, poison=(2, 102)),
        "clean": train_on_a_rank(root, order=[0, 1, 3]),
        "skipped": guard.skipped,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(scenarios, str(tmp_path_factory.mktemp("ranks")))


def statistics(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in state.items() if name.endswith(("running_mean", "running_var"))}


def parameters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in state.items() if name not in statistics(state)}


def test_averaged_parameters_are_equal_on_all_ranks_from_the_broadcast_on(ranks):
    a, b = (rank["plain"]["average"] for rank in ranks)
    assert not differing(parameters(a), parameters(b))


def test_resume_is_bitwise_equal_on_every_rank(ranks):
    assert differing(statistics(ranks[0]["plain"]["average"]), statistics(ranks[1]["plain"]["average"]))
    for rank in ranks:
        assert not differing(rank["plain"]["weights"], rank["resumed"]["weights"])
        assert not differing(rank["plain"]["average"], rank["resumed"]["average"])


def test_batch_norm_sync_makes_statistics_the_mean_over_ranks(ranks):
    for kind in ("weights", "average"):
        a, b = (rank["synced"][kind] for rank in ranks)
        assert not differing(a, b)
    # The sync after the first epoch changes the second one, so only the last one can be checked by its effect.
    assert differing(statistics(ranks[0]["synced"]["weights"]), statistics(ranks[0]["plain"]["weights"]))


def test_a_nan_on_one_rank_is_skipped_by_all_as_if_its_batch_had_never_come(ranks):
    assert [rank["skipped"] for rank in ranks] == [2, 2]
    for rank in ranks:
        assert not differing(rank["poisoned"], rank["clean"])
