"""Under 16-mixed the gradient scaler's scale and its counter of good steps come back with the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from callbacks import EMA, AtomicCheckpointIO, FiniteGuard, RngState
from training_tools import ToyData, differing, toy_module, toy_trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # resumed without saving again
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),  # the data knows where
]


def fit(root: Path, *callbacks: Any, ckpt_path: Path | None = None) -> tuple[Any, Any, torch.amp.GradScaler]:
    """Three epochs of four steps. The scale starts too high, comes down, and grows again every three good steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-20, growth_interval=3)
    ema, module = EMA(0.9), toy_module(schedule="cosine")
    trainer = toy_trainer(
        root,
        callbacks=[ema, FiniteGuard(), RngState(), *callbacks],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler), AtomicCheckpointIO()],
        enable_checkpointing=bool(callbacks),
        gradient_clip_val=1.0,
        max_epochs=3,
    )
    trainer.fit(module, datamodule=ToyData(), ckpt_path=ckpt_path)
    return module, ema, scaler


@pytest.mark.filterwarnings("ignore:gradient norm is")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("step", [1, 3, 7])
def test_the_scalers_state_comes_back(step: int, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    plain, average, scaler = fit(tmp_path, saves)
    saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["MixedPrecision"]
    assert saved["scale"] != 2.0**40, "the first step was skipped"
    resumed, average_again, scaler_again = fit(tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert scaler_again.state_dict() == scaler.state_dict()
    assert scaler.get_scale() > 1.0, "it came down to 1 and has grown"
    assert not differing(weights(resumed), weights(plain))
    assert not differing(weights(average_again.shadow()), weights(average.shadow()))
