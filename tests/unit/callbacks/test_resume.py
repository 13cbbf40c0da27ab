"""A run that stops after any step and goes on has the weights, the average and the masks of the unbroken run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import EMA, MESA, BatchNormSync, FiniteGuard, LRScaling, StepSeed
from training_tools import ToyData, differing, toy_module, toy_trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # the resumed run saves nothing
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint"),  # the datamodule keeps the position
]


def run(root: Path, *extra: Callback, accumulate: int, ckpt_path: Path | None = None):
    """MESA starts with epoch 1 of 3; dropout, BatchNorm, AdamW and a schedule are in it."""
    ema = EMA(0.9)
    behaviours = [
        MESA(1.0, start_ratio=0.0, schedule_epochs=3),
        StepSeed(7),
        ema,
        BatchNormSync(),
        FiniteGuard(),
        LRScaling(8, "sqrt"),
    ]
    module = toy_module(model_args={"drop_rate": 0.3}, schedule="warmup_cosine", warmup_epochs=1)
    settings = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    trainer = toy_trainer(root, callbacks=[*behaviours, *extra], enable_checkpointing=bool(extra), **settings)
    trainer.fit(module, datamodule=ToyData(), ckpt_path=ckpt_path)
    return weights(module), weights(ema.shadow()), trainer.global_step


@pytest.mark.parametrize("accumulate, stops", [(1, (2, 4, 6, 8)), (2, (1, 2, 3))])
def test_resume_is_bitwise_equal_mid_epoch_and_at_its_end(tmp_path, accumulate, stops):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(tmp_path, saving, accumulate=accumulate)
    assert whole[2] == 12 // accumulate
    for stop in stops:
        torch.manual_seed(1234)  # a new process has another global state
        resumed = run(tmp_path, accumulate=accumulate, ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert resumed[2] == whole[2]
        assert not differing(resumed[0], whole[0]), f"weights after a stop at step {stop}"
        assert not differing(resumed[1], whole[1]), f"average after a stop at step {stop}"
