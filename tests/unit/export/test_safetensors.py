"""Weights with their card: one file, or a folder that builds the network again."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

import restrike
import restrike.models
from parity_tools import fill_
from restrike.checkpoints import CheckpointError, load_released
from restrike.export import ExportError, ModelCard, save_hub_folder, save_safetensors
from restrike.export.safetensors import weights_to_save
from tiny_cut3r import SIZES as CUT3R_SIZES
from tiny_diffusionsfm import SIZES as RAY_SIZES
from tiny_models import SIDE, SIZES, random_images, tiny_fastervit
from tiny_vggt import SIZES as VGGT_SIZES
from tiny_vggt import tiny_vggt

NAME = "faster_vit_3_224"
CARD = ModelCard(
    NAME,
    json.loads(json.dumps(SIZES)),
    weights="ema",
    recipe="fastervit_3",
    licence="CC BY 4.0",
    code_version="0.1.0",
    metrics={"test/top1": 0.849},
    preprocessing={"image_size": SIDE, "mean": [0.5, 0.5, 0.5], "crop_pct": 1.0},
)


@pytest.fixture(scope="module")
def net():
    return tiny_fastervit(NAME).eval()


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    return save_hub_folder(net, tmp_path_factory.mktemp("hub") / "tiny", CARD)


def logits(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net(random_images(2, 3, SIDE, SIDE))


def test_each_tensor_is_saved_once_and_none_that_can_be_computed(net):
    weights = weights_to_save(net)
    assert not [name for name in weights if "relative_" in name or "to_global_feature" in name]
    own = {id(parameter) for parameter in net.parameters()}
    assert sum(weight.numel() for weight in weights.values()) >= sum(p.numel() for p in net.parameters())
    assert len(own) == sum(name in dict(net.named_parameters()) for name in weights)


def test_the_file_loads_and_its_card_can_be_read_without_the_weights(net, tmp_path):
    path = save_safetensors(net, tmp_path / "tiny.safetensors", CARD)
    fresh = tiny_fastervit(NAME, drop_path_rate=0.0).eval()
    nn.init.zeros_(fresh.head.weight)
    load_released(fresh, path)
    assert torch.equal(logits(fresh), logits(net))
    with safe_open(path, framework="pt") as file:
        card = file.metadata()
    assert card["model_name"] == NAME and card["weights"] == "ema" and card["licence"] == "CC BY 4.0"
    assert json.loads(card["metrics"]) == {"test/top1": 0.849}
    assert json.loads(card["model_args"])["depths"] == [1, 1, 2, 2]
    with pytest.raises(ExportError, match="never overwrites"):
        save_safetensors(net, path, CARD)


def test_a_folder_gives_the_same_network_back(net, folder):
    again = restrike.from_pretrained(folder)
    assert not again.training and torch.equal(logits(again), logits(net))
    assert "fastervit_3" in (folder / "README.md").read_text()


def test_timm_reads_the_folder_too(net, folder):
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(logits(again), logits(net))
    assert again.pretrained_cfg["input_size"] == (3, SIDE, SIDE) and again.pretrained_cfg["crop_pct"] == 1.0


def test_a_multiview_network_comes_back_too(tmp_path):
    net = tiny_vggt(enable_track=False)
    arguments = json.loads(json.dumps({**VGGT_SIZES, "enable_track": False}))
    again = restrike.from_pretrained(save_hub_folder(net, tmp_path / "vggt", ModelCard("vggt_1b", arguments)))
    state, ours = again.state_dict(), net.state_dict()
    assert state.keys() == ours.keys() and all(torch.equal(state[name], ours[name]) for name in ours)


def test_another_number_of_classes_starts_a_new_head(folder, net):
    again = restrike.from_pretrained(folder, num_classes=3)
    assert again.head.weight.shape[0] == 3
    assert torch.equal(again.patch_embed.conv_down[0].weight, net.patch_embed.conv_down[0].weight)


def test_other_sizes_than_the_weights_are_refused(folder):
    with pytest.raises(CheckpointError, match="another shape"):
        restrike.from_pretrained(folder, dim=32)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no config.json"),
        ("{", "is no model description"),
        ("{}", "is no model description"),
        ('{"architecture": "no_such_model"}', "neither Restrike nor timm"),
        ('{"architecture": "resnet18", "model_args": {"windows": 7}}', "refused its arguments"),
        ('{"architecture": "test_resnet"}', "no checkpoint"),
    ],
)
def test_a_damaged_folder_is_one_message(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        restrike.from_pretrained(tmp_path)


def test_a_missing_folder_is_one_message(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; expected a folder"):
        restrike.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["cut3r_512_dpt", "diffusionsfm_dense"])
def test_networks_that_take_more_than_images_go_out_as_weights_and_come_back(name, tmp_path):
    """DPT tensors with two names, derived tables."""
    dpt = {"dpt_features": 8, "dpt_out_channels": (8, 8, 16, 16)}
    sizes = {**CUT3R_SIZES, **dpt} if "cut3r" in name else RAY_SIZES
    net = fill_(restrike.models.build(name, **sizes)).eval()
    card = ModelCard(name, json.loads(json.dumps(sizes)))
    back = restrike.from_pretrained(save_hub_folder(net, tmp_path / "hub", card))
    save_safetensors(net, tmp_path / "net.safetensors", card)
    other = restrike.models.build(name, **sizes)
    load_released(other, tmp_path / "net.safetensors")
    for key, value in net.state_dict().items():
        assert torch.equal(value, back.state_dict()[key]) and torch.equal(value, other.state_dict()[key]), key
