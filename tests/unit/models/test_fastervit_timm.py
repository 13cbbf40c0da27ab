"""FasterViT behaves in timm as timm's own models do."""

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.optim import param_groups_layer_decay
from torch import nn

from restrike.models import build, list_models
from restrike.models.fastervit import FasterViT
from tiny_models import SIZES, random_images, tiny_fastervit

IMAGES = random_images(2, 3, 128, 128)
NAMES = list_models("fastervit")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_registered_with_its_evaluation_settings(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert isinstance(model, FasterViT) and timm.is_model(name)
    config = resolve_data_config(model=model)
    is_21k = "21k" in name
    assert config["crop_mode"] == ("squash" if is_21k else "center")
    crops = {"faster_vit_0": 0.875, "21k_224": 0.95, "21k_768": 0.93}
    assert config["crop_pct"] == next((crop for key, crop in crops.items() if key in name), 1.0)
    assert config["input_size"][1:] == model.resolution and config["interpolation"] == "bicubic"
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert model.get_classifier() is model.get_submodule(model.default_cfg["classifier"])
    assert isinstance(model.get_submodule(model.default_cfg["first_conv"]), nn.Conv2d)


def test_there_are_22_models():
    assert len(NAMES) == len(set(NAMES)) == 22


def test_feature_extraction_gives_the_four_maps_before_downsampling():
    features = timm.create_model("faster_vit_3_224", features_only=True, **SIZES)
    assert features.feature_info.channels() == [16, 32, 64, 128]
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(f.shape) for f in features(IMAGES)] == [
        (2, 16, 32, 32),
        (2, 32, 16, 16),
        (2, 64, 8, 8),
        (2, 128, 4, 4),
    ]
    some = timm.create_model("faster_vit_3_224", features_only=True, out_indices=(1, 2), **SIZES)
    assert [f.shape[1] for f in some(IMAGES)] == [32, 64]
    assert not any(name.startswith("model.levels.3") for name, _ in some.named_parameters())


def test_feature_extraction_with_gradients_and_hooks():
    features = timm.create_model("faster_vit_3_224", features_only=True, out_indices=(2,), **SIZES)
    features(IMAGES)[0].sum().backward()
    assert features.model.patch_embed.conv_down[0].weight.grad is not None


def test_forward_is_made_of_its_two_halves():
    model = tiny_fastervit().eval()
    with torch.no_grad():
        maps = model.forward_features(IMAGES)
        pooled = model.forward_head(maps, pre_logits=True)
        assert maps.shape == (2, 128, 4, 4) and pooled.shape == (2, 128)
        assert torch.equal(pooled, maps.mean((2, 3))) or torch.allclose(pooled, maps.mean((2, 3)))
        assert torch.equal(model.forward_head(maps), model(IMAGES))
        assert torch.equal(model.get_classifier()(pooled), model(IMAGES))


def test_intermediates():
    model = tiny_fastervit().eval()
    with torch.no_grad():
        final, stages = model.forward_intermediates(IMAGES)
        assert torch.equal(final, model.forward_features(IMAGES)) and len(stages) == 4
        early = model.forward_intermediates(IMAGES, indices=[0, 2], stop_early=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(early, (stages[0], stages[2]), strict=True))
        (last,) = model.forward_intermediates(IMAGES, indices=1, norm=True, intermediates_only=True)
        assert torch.equal(last, final)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(IMAGES, output_fmt="NLC")


def test_pruning_keeps_what_the_intermediates_need():
    model = tiny_fastervit().eval()
    with torch.no_grad():
        expected = model.forward_intermediates(IMAGES, intermediates_only=True)[1]
        assert model.prune_intermediate_layers([1]) == [1]
        assert torch.equal(model.forward_intermediates(IMAGES, indices=[1], intermediates_only=True)[0], expected)
        assert torch.equal(model(IMAGES), expected) and model.num_features == 32
    assert len(model.levels) == 2 and not list(model.head.parameters())


def test_classifier_can_be_reset_or_removed():
    model = tiny_fastervit().eval()
    model.reset_classifier(3)
    assert model.get_classifier().out_features == model.num_classes == 3
    assert model(IMAGES).shape == (2, 3)
    model.reset_classifier(0)
    assert model(IMAGES).shape == (2, 128)
    model.reset_classifier(0, "")
    assert model(IMAGES).shape == (2, 128, 4, 4)
    model.reset_classifier(5, "catavgmax")
    assert model(IMAGES).shape == (2, 5)
    assert build("faster_vit_3_224", **{**SIZES, "num_classes": 0})(IMAGES).shape == (2, 128)


def test_input_channels_and_pooling_are_arguments():
    model = build("faster_vit_3_224", in_chans=5, global_pool="max", **SIZES)
    assert model(random_images(2, 5, 128, 128)).shape == (2, 10)


def test_gradient_checkpointing_changes_neither_gradients_nor_batch_statistics():
    plain, recomputing = (tiny_fastervit(drop_path_rate=0.2).train() for _ in range(2))
    recomputing.set_grad_checkpointing()
    calls = []
    for block in (recomputing.levels[0].blocks[0], recomputing.levels[2].blocks[0]):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, recomputing):
        torch.manual_seed(0)
        model(IMAGES).square().sum().backward()
    assert len(calls) == 4
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), recomputing.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_layer_groups_and_weight_decay():
    model = tiny_fastervit()
    assert model.no_weight_decay() == set()
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    order = ["patch_embed.conv_down.0.weight", "levels.0.blocks.0.conv1.weight", "levels.0.downsample.norm.weight"]
    order += ["levels.2.blocks.0.mlp.fc1.weight", "levels.2.blocks.1.mlp.fc1.weight", "head.weight"]
    scales = [scale[id(model.get_parameter(name))] for name in order]
    assert scales == sorted(scales) and scales[0] < scales[-1] == 1.0
    assert {p.ndim > 1 for g in groups for p in g["params"] if g["weight_decay"]} == {True}


def test_initialisation():
    torch.manual_seed(0)
    model = build("faster_vit_3_224", **SIZES)
    modules = dict(model.named_modules())
    linear = torch.cat([m.weight.flatten() for m in modules.values() if isinstance(m, nn.Linear)])
    assert abs(linear.std() - 0.02) < 2e-4 and abs(linear.mean()) < 2e-4
    assert not any(m.bias.any() for m in modules.values() if isinstance(m, nn.Linear) and m.bias is not None)
    conv = modules["levels.1.downsample.reduction.0"].weight  # PyTorch's own: uniform within 1 / sqrt(fan in)
    assert 0.95 < conv.abs().max() * (9 * 32) ** 0.5 <= 1
    norms = [m for m in modules.values() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    assert all((m.weight == 1).all() and not m.bias.any() for m in norms)
    assert (modules["levels.2.blocks.0"].gamma1 == 1e-5).all()


def test_other_constructor_arguments_take_part():
    model = build(
        "faster_vit_3_224",
        **{**SIZES, "depths": (1, 1, 1, 1)},
        qkv_bias=False,
        layer_norm_last=True,
        layer_scale_conv=0.1,
        drop_rate=0.5,
        proj_drop_rate=0.1,
        attn_drop_rate=0.1,
        mlp_ratio=2,
    )
    names = dict(model.named_parameters())
    assert "levels.2.blocks.0.attn.qkv.bias" not in names and names["levels.0.blocks.0.gamma"].shape == (16,)
    assert names["levels.3.blocks.0.mlp.fc1.weight"].shape == (256, 128)
    model.train()
    assert not torch.equal(model(IMAGES), model(IMAGES))
    model.eval()
    assert torch.equal(model(IMAGES), model(IMAGES))
