"""CUT3R's recipes: the published table, the chain of stages at smoke size, and going on inside a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cli.__main__ import main
from lightning_modules import RecurrentReconstructionModule
from recipes import composed, path

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice about tiny runs

STAGES = ("stage1", "stage2", "stage3", "stage4", "dpt_512_vary_4_64")
COLUMNS = (
    "model", "is_frozen", "lr", "min_lr", "epochs", "warmup", "scenes", "parts", "accumulated", "views", "varies",
    "is_long", "checkpointing", "criterion", "samples", "mixture",
)  # fmt: skip
LINEAR, DPT = "cut3r_224_linear", "cut3r_512_dpt"
# The published values of all six.
TABLE = {
    "stage1": (LINEAR, 0, 1e-4, 1e-6, 100, 10, 16, 1, 1, 4, 0, 0, 0, "static", 32000, 806000),
    "stage2": (LINEAR, 0, 5e-6, 1e-6, 35, 1, 16, 1, 1, 4, 0, 0, 0, "mixed", 48000, 801880),
    "stage3": (DPT, 0, 1e-5, 1e-6, 40, 2, 16, 1, 1, 4, 0, 0, 1, "mixed", 44800, 729248),
    "stage4": (DPT, 1, 1e-6, 1e-7, 10, 0.5, 16, 1, 1, 32, 0, 1, 1, "static", 22400, 398684),
    "dpt_512_vary_4_64": (DPT, 1, 1e-6, 1e-7, 10, 0.5, 16, 4, 1, 64, 1, 1, 1, "mixed", 44800, 756248),
    "linear_224_fixed_16": (LINEAR, 1, 1e-6, 1e-7, 10, 0.5, 6, 1, 2, 16, 0, 0, 0, "mixed", 44800, 797368),
}


@pytest.mark.parametrize("name", TABLE)
def test_recipes_hold_the_published_values(name):
    config = composed(f"cut3r_{name}")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    shape = data["shape"]["init_args"]
    got = (
        model["model_name"],
        "staged_freezing" in config["callbacks"],
        model["lr"],
        model["min_lr"],
        trainer["max_epochs"],
        model["warmup_epochs"],
        shape["scenes"],
        model.get("accum_steps", 1),
        trainer["accumulate_grad_batches"],
        shape["views"],
        shape.get("vary_views", False),
        model.get("long_context", False),
        model.get("grad_checkpointing", False),
        model["criterion"],
        data["mixture"]["Co3d_Multi"],
        sum(data["mixture"].values()),
    )
    assert dict(zip(COLUMNS, got, strict=True)) == dict(zip(COLUMNS, TABLE[name], strict=True))
    assert data["epoch_length"] == data["mixture"]["Co3d_Multi"]
    assert (model["optimizer"], model["betas"], model["eps"], model["weight_decay"]) == (
        "adamw",
        [0.9, 0.95],
        1e-8,
        0.05,
    )
    assert (model["schedule"], model["warmup_lr"], model["alpha"]) == ("progress_cosine", 0.0, 0.2)
    assert (trainer["gradient_clip_val"], trainer["precision"], trainer["devices"]) == (1.0, "bf16-mixed", 8)
    assert trainer["strategy"]["init_args"]["find_unused_parameters"]
    assert (model.get("chunk_views"), model.get("trained_chunks")) == (
        (4, 4) if model.get("long_context") else (None,) * 2
    )


def test_each_stage_starts_from_the_last_ones_weights():
    for before, stage in zip(STAGES[:3], STAGES[1:4], strict=True):
        start = composed(f"cut3r_{stage}")["model"]["init_args"]["pretrained"]
        assert start == f"{composed(f'cut3r_{before}')['run_dir']}/checkpoints/last.ckpt"


@pytest.mark.parametrize(
    "use, message",
    [
        ("[WildRGBD_Multi]", "nothing here reads WildRGBD_Multi yet"),
        ("[Co3d_Multi,ScanNet_Multi]", "nothing here reads ScanNet_Multi yet"),
        ("[Co3d]", "not in data.mixture; nearest: Co3d_Multi"),
    ],
)
def test_a_data_set_that_nothing_reads_is_one_clear_message(use, message, toy_set, tmp_path, capsys):
    options = ["+smoke=cut3r", "--run_dir", str(tmp_path / "run"), "--data.data", str(toy_set)]
    assert main(["fit", "--config", path("cut3r_stage2"), *options, f"data.init_args.use={use}"]) == 2
    assert message in capsys.readouterr().err


def fit(stage: str, run: Path, data: Path, *options: str) -> int:
    smoke = ["+smoke=cut3r", "--run_dir", str(run), "--data.data", str(data)]
    return main(["fit", "--config", path(f"cut3r_{stage}"), *smoke, *options])


def weights(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_the_chain_of_stages_at_smoke_size(toy_set, tmp_path, capsys):
    """Each stage begins with the last one's weights; what a stage adds is new; what it freezes stays."""
    start: list[str] = []
    before: dict[str, Any] = {}
    for stage in STAGES:
        if stage == "stage3":
            start.append("model.init_args.pretrained_fresh=[downstream_head.dpt_*,downstream_head.*proj.*]")
        # Without a rate no weight moves: what the file holds is what the stage begins with.
        start.append("--trainer.limit_val_batches=0")
        still = ["--model.lr=1e-30", "--model.min_lr=0", "--trainer.max_steps=1"]
        assert fit(stage, tmp_path / f"{stage}_start", toy_set, *start, *still) == 0, capsys.readouterr()
        begun = weights(tmp_path / f"{stage}_start")
        assert [n for n in begun if n in before and not torch.equal(begun[n], before[n])] == []
        new = {n.split(".")[2] for n in begun if n not in before} if before else set()
        assert new == ({"dpt_self", "dpt_cross", "dpt_rgb"} if stage == "stage3" else set())
        assert fit(stage, tmp_path / stage, toy_set, *start) == 0, capsys.readouterr()
        before = weights(tmp_path / stage)
        moved = [n for n in before if not torch.equal(before[n], begun[n])]
        assert any(n.startswith("net.dec_blocks_state") for n in moved)
        assert any(n.startswith("net.enc_blocks.") for n in moved) == (stage in STAGES[:3])
        start = [f"--model.pretrained={tmp_path / stage}/checkpoints/last.ckpt"]


class Killed(BaseException):
    """As if the process were gone."""


@pytest.mark.parametrize("stage", ["stage1", "stage4"])
def test_a_run_goes_on_inside_a_stage_as_if_never_stopped(stage, toy_set, tmp_path, capsys, monkeypatch):
    options = ["model=cut3r_224_linear", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=0"]
    saved = "--callbacks.checkpoint.every_n_train_steps=2"
    assert fit(stage, tmp_path / "whole", toy_set, *options) == 0, capsys.readouterr()

    def die(module: RecurrentReconstructionModule, *_: Any) -> None:
        if module.trainer.global_step == 2:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RecurrentReconstructionModule, "on_train_batch_end", die)
        fit(stage, tmp_path / "cut", toy_set, *options, saved)
    assert fit(stage, tmp_path / "cut", toy_set, *options, "--ckpt_path", "last") == 0, capsys.readouterr()
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert [n for n in whole if not torch.equal(whole[n], cut[n])] == []
    # A finished stage is left as it is.
    assert fit(stage, tmp_path / "cut", toy_set, *options, "--ckpt_path", "last") == 0, capsys.readouterr()
    after = weights(tmp_path / "cut")
    assert [n for n in whole if not torch.equal(whole[n], after[n])] == []
