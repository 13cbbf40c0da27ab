"""FSDP2: a network split over two ranks trains as under DDP, and says what it can't do."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from callbacks import EMA
from distributed import run_ranks
from training_tools import ToyData, toy_module, toy_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # torch's own about CPU meshes
VIT = {"model_name": "test_vit", "model_args": {"img_size": 32, "depth": 2}, "lr": 1e-2, "optimizer": "sgd"}


def strategy(sharded: bool, tensor_parallel: int = 1) -> Any:
    if not sharded:
        return DDPStrategy(process_group_backend="gloo", static_graph=True, gradient_as_bucket_view=True)
    return ModelParallelStrategy(
        data_parallel_size=2 // tensor_parallel, tensor_parallel_size=tensor_parallel, save_distributed_checkpoint=False
    )


def train(rank: int, sharded: bool, precision: str, folder: str, **fit: Any) -> dict[str, Any]:
    """Two epochs of four steps; the logged loss and norm, and the full weights as the checkpoint has them."""
    module = toy_module(**VIT, head_lr_factor=2.0, grad_checkpointing=True)
    trainer = toy_trainer(
        Path(folder), devices=2, strategy=strategy(sharded), precision=precision, gradient_clip_val=1.0, **fit
    )
    trainer.fit(module, datamodule=ToyData())
    path = f"{folder}/{'sharded' if sharded else 'ddp'}-{precision}.ckpt"
    trainer.save_checkpoint(path)
    return {"logged": {k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("train/")}, "path": path}


def compare(rank: int, folder: str) -> list[dict[str, Any]]:
    runs = [
        train(rank, sharded, precision, folder) for sharded in (True, False) for precision in ("32-true", "bf16-mixed")
    ]
    module = toy_module(**VIT, head_lr_factor=2.0)
    trainer = toy_trainer(Path(folder), devices=2, strategy=strategy(True), max_epochs=3)
    trainer.fit(module, datamodule=ToyData(), ckpt_path=runs[0]["path"])
    return [*runs, {"steps": trainer.global_step}]


def refuse(rank: int, folder: str) -> list[str]:
    messages = []
    for tensor_parallel, callbacks in ((1, [EMA(0.9)]), (2, [])):
        trainer = toy_trainer(Path(folder), devices=2, strategy=strategy(True, tensor_parallel), callbacks=callbacks)
        try:
            trainer.fit(toy_module(**VIT), datamodule=ToyData())
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_sharded_network_trains_as_under_ddp_and_resumes():
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(compare, folder)
        sharded, sharded_bf16, ddp, ddp_bf16, resumed = ranks[0]
        ours, theirs = (torch.load(run["path"], weights_only=True)["state_dict"] for run in (sharded, ddp))
    assert sharded["logged"] == pytest.approx(ddp["logged"], rel=1e-4)
    assert sharded["logged"]["train/grad_norm"] > 0
    assert sharded_bf16["logged"] == pytest.approx(ddp_bf16["logged"], rel=5e-2)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert resumed["steps"] == 12


def test_what_cannot_be_sharded_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        ema, tensor_parallel = run_ranks(refuse, folder)[0]
    assert "~callbacks.ema" in ema
    assert "set tensor_parallel_size to 1" in tensor_parallel


def test_activation_checkpointing_changes_no_gradient():
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        module = toy_module(**VIT, grad_checkpointing=checkpointing).train()
        module(images).square().mean().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert module.net.grad_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_network_without_activation_checkpointing_is_named(monkeypatch):
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear has no activation checkpointing"):
        toy_module(grad_checkpointing=True)


def test_selective_checkpointing_is_refused_where_a_network_has_none():
    with pytest.raises(ValueError, match="has no selective form; set it to true"):
        toy_module(**VIT, grad_checkpointing="selective")
