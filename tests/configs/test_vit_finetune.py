"""The fine-tuning recipe: its learning rates, freezing, averaging, and the weights that it starts from."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cli.__main__ import main
from cli.compose import compose_all
from lightning_modules import ClassificationModule
from lightning_modules.networks import build_network
from restrike.optim import scale_factor

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "conf" / "vit_finetune.yaml")
TINY = {"img_size": 56, "embed_dim": 32, "depth": 2, "num_heads": 2}
NAME = "vit_base_patch14_reg4_dinov2.lvd142m"
pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice about tiny runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    assert main(["prepare", "photos", "--out", str(folder), "--train-per-class", "2", "--val-per-class", "1"]) == 0
    return folder


def fit(run: Path, photos: Path, *argv: str) -> list[dict[str, str]]:
    """Two steps at smoke size; the rows of the log."""
    smoke = ["+smoke=vit", "--run_dir", str(run), "--data.data", str(photos)]
    assert main(["fit", "--config", RECIPE, *smoke, *argv]) == 0
    with open(run / "metrics" / "version_0" / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row[name]]


def test_the_recipe_holds_the_guides_values():
    config = compose_all([RECIPE], []).config
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert (model["model_name"], data["image_size"], data["batch_size_per_device"]) == (NAME, 518, 16)
    assert (model["lr"], model["head_lr_factor"], model["optimizer"]) == (1e-6, 1e4, "adamw")
    assert (model["weight_decay"], model["schedule"], trainer["gradient_clip_val"]) == (0.05, "cosine", 2.0)
    assert (model["model_args"]["img_size"], data["crop_pct"]) == ("${data.init_args.image_size}", 1.0)
    scaling = config["callbacks"]["lr_scaling"]["init_args"]
    for batch, expected in ((16, 1e-6), (32, 1.414e-6), (trainer["devices"] * data["batch_size_per_device"], 2.828e-6)):
        lr = model["lr"] * scale_factor(scaling["rule"], batch, scaling["reference_batch_size"])
        assert lr == pytest.approx(expected, rel=3e-4)
    assert trainer["devices"] * data["batch_size_per_device"] == 8 * 16


def test_rates_follow_the_batch_and_the_head_learns_faster(photos, tmp_path):
    argv = [
        "--data.batch_size_per_device",
        "16",
        "--trainer.accumulate_grad_batches",
        "2",
        "--model.schedule",
        "constant",
    ]
    rows = fit(tmp_path / "run", photos, *argv)
    rate = math.sqrt(2) * 1e-6
    names = ("no_decay", "decay", "head/no_decay", "head/decay")
    for name, expected in zip(names, (rate, rate, 1e4 * rate, 1e4 * rate), strict=True):
        found = column(rows, f"lr/{name}")
        assert found and found == pytest.approx([expected] * len(found))
    assert column(rows, "train/grad_norm")


def test_freeze_backbone_trains_the_head_alone_and_the_average_is_an_option(photos, tmp_path):
    rows = fit(tmp_path / "run", photos, "--freeze_backbone", "+option=ema")
    assert len(column(rows, "val/top1_ema")) == 1
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    trained, average = checkpoint["state_dict"], checkpoint["callbacks"]["EMA"]["shadow"]
    # The average has left the weights behind exactly where they moved.
    moved = {name for name, value in average.items() if not torch.equal(value, trained[f"net.{name}"])}
    assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize("has_head", [False, True])
def test_released_weights_load_from_a_file_into_another_head_and_resolution(tmp_path, has_head):
    released = build_network(NAME, num_classes=7 if has_head else 0, **TINY)
    save_file(released.state_dict(), tmp_path / "model.safetensors")
    module = ClassificationModule(
        NAME, 5, TINY | {"img_size": 84}, pretrained=str(tmp_path / "model.safetensors"), pretrained_adapt=True
    )
    theirs, ours = released.state_dict(), module.net.state_dict()
    assert ours["pos_embed"].shape == (1, 36, 32) and theirs["pos_embed"].shape == (1, 16, 32)
    torch.testing.assert_close(ours["pos_embed"].mean((0, 1)), theirs["pos_embed"].mean((0, 1)), atol=2e-3, rtol=0)
    same = theirs.keys() - {"pos_embed", "head.weight", "head.bias"}
    assert all(torch.equal(ours[name], theirs[name]) for name in same)
    assert ours["head.weight"].shape == (5, 32)


def test_weights_that_lack_more_than_the_head_are_refused(tmp_path):
    state = build_network(NAME, num_classes=0, **TINY).state_dict()
    del state["blocks.1.attn.qkv.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="only in the model: blocks.1.attn.qkv.weight"):
        ClassificationModule(NAME, 5, TINY, pretrained=str(tmp_path / "model.safetensors"), pretrained_adapt=True)


def test_timms_download_says_what_to_do_without_a_network(monkeypatch):
    import timm

    def create(name: str, pretrained: bool, **_: object) -> None:
        assert pretrained
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ValueError, match="no route to host.*give the file as model.pretrained"):
        ClassificationModule(NAME, 5, TINY, pretrained="timm")
    with pytest.raises(ValueError, match="is not timm's"):
        ClassificationModule("faster_vit_0_224", 5, pretrained="timm")
