"""Every layout of a file loads into the model that it is for, and into no other."""

import argparse
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file

from restrike.checkpoints import CheckpointError, load_released, released_name, save_released
from restrike.models import build
from restrike.models.layers.derived import derived_buffer_names
from tiny_diffusionsfm import SIZES as DIFFUSIONSFM_SIZES
from tiny_diffusionsfm import tiny_diffusionsfm
from tiny_models import SIZES, random_images, tiny_fastervit

IMAGES = random_images(1, 3, 128, 128)


@torch.no_grad()
def logits(model):
    return model.eval()(IMAGES)


@pytest.fixture
def trained():
    return tiny_fastervit().eval()


@pytest.fixture
def averaged():
    model = tiny_fastervit().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    return model


def untrained(name="faster_vit_3_224", **overrides):
    return build(name, **{**SIZES, **overrides})


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


LAYOUTS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"epoch": 1, "state_dict": s, "args": argparse.Namespace(a=1)},
    "model": lambda s: {"model": s, "optimizer": {}},
    "state_dict before model": lambda s: {"model": {"x": torch.zeros(1)}, "state_dict": s},
    "data parallel": lambda s: {"state_dict": prefixed(s, "module.")},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "both": lambda s: prefixed(s, "module._orig_mod."),
    "encoder": lambda s: prefixed(s, "encoder.") | {"predictor.weight": torch.zeros(3)},
    "lightning": lambda s: {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {"criterion.weight": torch.zeros(2)} | prefixed(s, "net."),
        "callbacks": {},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(trained, tmp_path, layout):
    torch.save(LAYOUTS[layout](trained.state_dict()), tmp_path / "w.pth")
    model = untrained()
    assert load_released(model, tmp_path / "w.pth") == ([], [])
    assert torch.equal(logits(model), logits(trained))


def test_safetensors_without_derived_buffers_or_aliases(trained, tmp_path):
    parameters = dict(trained.named_parameters()) | dict(trained.named_buffers())
    wanted = {n: t.contiguous() for n, t in parameters.items() if n not in derived_buffer_names(trained)}
    assert not any("to_global_feature" in name for name in wanted)
    save_file(wanted, tmp_path / "w.safetensors")
    model = untrained()
    assert load_released(model, tmp_path / "w.safetensors") == ([], [])
    assert torch.equal(logits(model), logits(trained))


EMA_LAYOUTS = {
    "release": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema},
    "timm": lambda raw, ema: {"state_dict": raw, "model_ema": prefixed(ema, "module.")},
    "lightning": lambda raw, ema: {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": prefixed(raw, "net."),
        "callbacks": {"Other": {}, "EMA{'decay': 0.9}": {"shadow": ema}},
    },
}


@pytest.mark.parametrize("layout", EMA_LAYOUTS)
def test_raw_or_averaged_weights_can_be_picked(trained, averaged, tmp_path, layout):
    torch.save(EMA_LAYOUTS[layout](trained.state_dict(), averaged.state_dict()), tmp_path / "w.pth")
    for use_ema, expected in ((False, trained), (True, averaged)):
        model = untrained()
        load_released(model, tmp_path / "w.pth", use_ema=use_ema)
        assert torch.equal(logits(model), logits(expected))


def test_a_file_without_averaged_weights_says_so(trained, tmp_path):
    torch.save({"epoch": 1, "state_dict": trained.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth has no EMA weights \(its keys: epoch, state_dict"):
        load_released(untrained(), tmp_path / "w.pth", use_ema=True)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"state_dict": {"a": 1}}, torch.zeros(3)])
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth"):
        load_released(untrained(), tmp_path / "w.pth")


def test_names_must_match_unless_told_otherwise(trained, tmp_path, caplog):
    state = trained.state_dict()
    del state["head.weight"]
    state["neck.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"only in the model: head\.weight; only in the file: neck\.weight"):
        load_released(untrained(), tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING):
        report = load_released(untrained(), tmp_path / "w.pth", strict=False)
    assert report.missing == ["head.weight"] and report.unexpected == ["neck.weight"]
    assert "neck.weight" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"dim": 32}, r"another shape: .* and \d+ more"), ({"layer_scale": None}, r"does not fit .*only in the file")],
)
def test_a_refused_file_leaves_the_model_as_it_was(trained, tmp_path, overrides, message):
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    model = untrained(**overrides)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_released(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_old_files_without_batch_norm_counters(trained, tmp_path):
    state = {n: t for n, t in trained.state_dict().items() if "num_batches_tracked" not in n}
    torch.save(state, tmp_path / "w.pth")
    assert load_released(untrained(), tmp_path / "w.pth") == ([], [])


def test_another_resolution_takes_all_weights_that_it_has_use_for(trained, tmp_path, caplog):
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    square = untrained("faster_vit_3_any_res", resolution=256)
    assert load_released(square, tmp_path / "w.pth") == ([], []) and not caplog.text
    assert torch.equal(logits(square), logits(trained))

    oblong = untrained("faster_vit_3_any_res", resolution=(128, 192))
    report = load_released(oblong, tmp_path / "w.pth")
    assert report.unexpected and all(".hat_pos_embed." in name for name in report.unexpected) and not report.missing
    assert "hat_pos_embed" in caplog.text

    single = untrained("faster_vit_3_any_res", resolution=64)
    report = load_released(single, tmp_path / "w.pth")
    assert all("hat_" in name or "gamma" in name for name in report.unexpected) and not report.missing


def test_another_window_size_takes_all_weights(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    model = untrained("faster_vit_3_any_res", resolution=128, window_size=(7, 7, 2, 2))
    assert load_released(model, tmp_path / "w.pth") == ([], [])


def test_model_path_adapts_classifier_and_input_channels(trained, tmp_path):
    save_released(tmp_path / "w.pth.tar", trained)
    same = build("faster_vit_3_224", model_path=tmp_path / "w.pth.tar", **SIZES)
    assert torch.equal(logits(same), logits(trained))
    other = build("faster_vit_3_224", model_path=tmp_path / "w.pth.tar", **{**SIZES, "num_classes": 3}, in_chans=1)
    assert other.head.out_features == 3
    ours, theirs = other.patch_embed.conv_down[0].weight, trained.patch_embed.conv_down[0].weight
    assert torch.allclose(ours, theirs.sum(1, keepdim=True))
    features = build("faster_vit_3_224", model_path=tmp_path / "w.pth.tar", features_only=True, **SIZES)
    with torch.no_grad():
        expected = trained.forward_intermediates(IMAGES, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(features.eval()(IMAGES), expected, strict=True))


def test_published_files_load_strictly_here_and_in_timm(trained, averaged, tmp_path):
    path = tmp_path / "run" / "w.pth.tar"
    save_released(path, trained, ema=averaged, epoch=7, arch="faster_vit_3_224", metric=81.5)
    content = torch.load(path, weights_only=True)
    assert {key: content[key] for key in ("epoch", "arch", "metric", "version")} == {
        "epoch": 7,
        "arch": "faster_vit_3_224",
        "metric": 81.5,
        "version": 2,
    }
    assert list(content["state_dict"]) == list(content["state_dict_ema"]) == list(trained.state_dict())
    for use_ema, expected in ((False, trained), (True, averaged)):
        ours, theirs = untrained(), untrained()
        load_released(ours, path, use_ema=use_ema)
        timm.models.load_checkpoint(theirs, str(path), use_ema=use_ema, strict=True)
        assert torch.equal(logits(ours), logits(expected)) and torch.equal(logits(theirs), logits(expected))


def test_published_files_hold_true_derived_values(trained, tmp_path):
    save_released(tmp_path / "w.pth", trained, ema=trained.state_dict())
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    name = "levels.2.blocks.0.attn.pos_emb_funct.relative_bias"
    expected = trained.levels[2].blocks[0].attn.pos_emb_funct(num_leading=4)
    for state in (content["state_dict"], content["state_dict_ema"]):
        assert torch.equal(state[name], expected)
        assert state[name].untyped_storage().nbytes() == expected.nbytes


@pytest.mark.parametrize("name", ["diffusionsfm_sparse", "diffusionsfm_dense"])
def test_a_published_diffusionsfm_loads_strictly(name, tmp_path):
    """Its derived tables are small, so the live module holds them as they are."""
    net, other = tiny_diffusionsfm(name), build(name, **DIFFUSIONSFM_SIZES)
    save_released(tmp_path / "w.pth.tar", net, ema=net.state_dict())
    assert torch.load(tmp_path / "w.pth.tar", weights_only=True)["state_dict"].keys() == net.state_dict().keys()
    load_released(other, tmp_path / "w.pth.tar", use_ema=True)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())


def test_released_names():
    assert released_name("fastervit", "levels.2.blocks.0.gamma1") == "levels.2.blocks.0.gamma1"
    with pytest.raises(ValueError, match=r"unknown family 'x'; there are: fastervit"):
        released_name("x", "a")


def test_pretrained_weights_come_through_the_safe_loader(trained, tmp_path, monkeypatch):
    save_released(tmp_path / "w.pth.tar", trained)
    asked = []

    def download(repo, filename, **_):
        asked.append((repo, filename))
        return str(tmp_path / "w.pth.tar")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    model = timm.create_model("faster_vit_3_224", pretrained=True, **SIZES)
    assert torch.equal(logits(model), logits(trained))
    assert asked == [("ahatamiz/FasterViT", "fastervit_3_224_1k.pth.tar")]
    assert model.default_cfg["license"] == "other"
