"""FasterViT against numbers recorded from the released code."""

import gzip
import json

import pytest
import torch

from parity_tools import PARITY_DIR, fill_, imagenet_image, load_case, normal, relative_error
from restrike.models import build
from restrike.models.fastervit.positions import bias_tables, gather_bias
from restrike.models.fastervit.windows import carriers_to_raster, to_windows
from restrike.optim import clip_gradients, create_optimizer, param_groups

# What the cases' authors ask of float32; the released code against its own float64 reaches 4e-7.
FORWARD = 5e-6
TRAIN = {"loss": 1e-5, "loss_after": 2e-5, "grad_norm": 5e-5, "logits_step0_train": 5e-5, "grad0": 1e-4, "after": 5e-4}
EVAL_INPUTS = {
    "v0_224_plainfill": ("fv.v0.a", 2, 3, 224, 224),
    "v0_224": ("fv.v0.b", 2, 3, 224, 224),
    "v0_anyres_256x320_square_padded": ("fv.any.a", 1, 3, 256, 320),
    "v0_anyres_224x320_nonsquare": ("fv.any.b", 2, 3, 224, 320),
    "v0_anyres_112_single_window": ("fv.any.c", 2, 3, 112, 112),
    "tiny_layerscale_propagation": ("fv.tiny.a", 2, 3, 128, 128),
}
KEYS = json.loads(gzip.decompress((PARITY_DIR / "fastervit" / "keys.json.gz").read_bytes()))


def rebuild(case, **overrides):
    """The case's model with its weights, in eval mode, and what was recorded."""
    meta, recorded = load_case("fastervit", case)
    variant = meta["variant"] if meta["variant"].startswith("faster_vit") else "faster_vit_0_224"
    model = fill_(build(variant, **{**meta["constructor"], **overrides})).eval()
    if case != "v0_224_plainfill":  # the others keep the window bias small, so that carriers show in the logits
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("pos_emb_funct.cpb_mlp.2.weight"):
                    parameter.copy_(-parameter.abs())
    return model, recorded


def run_with_taps(model, images):
    """Every recorded tensor of an eval forward, by its name in the cases."""
    taps = {}
    model.patch_embed.register_forward_hook(lambda _, args, out: taps.update(stem=out))
    model.head.register_forward_hook(lambda _, args, out: taps.update(pooled=args[0], logits=out))
    model.norm.register_forward_hook(lambda _, args, out: taps.update(stage3=args[0]))
    for i, level in enumerate(model.levels[:3]):
        level.downsample.register_forward_hook(
            lambda _, args, out, i=i: taps.update({f"stage{i}": args[0], f"level{i}": out})
        )
    with torch.no_grad():
        model(images)
    return taps


@pytest.mark.parametrize("case", EVAL_INPUTS)
def test_eval_forward(case):
    model, recorded = rebuild(case)
    taps = run_with_taps(model, imagenet_image(*EVAL_INPUTS[case]))
    assert {name: e for name in recorded if (e := relative_error(taps[name], recorded[name])) > FORWARD} == {}


@pytest.mark.parametrize("case", EVAL_INPUTS)
def test_features_and_inference_form(case):
    model, recorded = rebuild(case)
    images = imagenet_image(*EVAL_INPUTS[case])
    with torch.no_grad():
        stages = model.forward_intermediates(images, intermediates_only=True)
        logits = model.switch_to_deploy()(images)
    errors = [relative_error(stage, recorded[f"stage{i}"]) for i, stage in enumerate(stages)]
    assert max(*errors, relative_error(logits, recorded["logits"])) < FORWARD


@pytest.mark.parametrize("case", [name for name in EVAL_INPUTS if "anyres" in name])
def test_recorded_numbers_at_sizes_that_the_model_was_not_built_for(case):
    model, recorded = rebuild(case, resolution=224)
    with torch.no_grad():
        logits = model(imagenet_image(*EVAL_INPUTS[case]))
    assert relative_error(logits, recorded["logits"]) < FORWARD


def test_corrected_carriers_differ_from_the_release_at_unequal_sides():
    case = "v0_anyres_224x320_nonsquare"
    model, recorded = rebuild(case, as_released=False)
    with torch.no_grad():
        error = relative_error(model(imagenet_image(*EVAL_INPUTS[case])), recorded["logits"])
    assert 1e-4 < error < 1e-1


def test_internals_of_a_hierarchical_stage():
    model, recorded = rebuild("v0_hat_internals")
    x, c = normal("fv.int.x", 2, 256, 14, 14), normal("fv.int.c", 1, 64, 20, 20)
    stage, grid = model.levels[2], (2, 2)
    block = stage.blocks[0]
    with torch.no_grad():
        got = {"carriers0": stage.global_tokenizer(x), "windows0": to_windows(x.permute(0, 2, 3, 1), 7)}
        positions = next(iter(stage.positions(grid)))
        got["pos_tokens"], got["bias_attn"], got["pos_carriers"], got["bias_hat"] = positions
        got["carriers_raster"] = carriers_to_raster(got["carriers0"], grid, 2)
        got["windows1"], got["carriers1"] = block(got["windows0"], got["carriers0"], positions, grid)
        got["conv_block"] = model.levels[0].blocks[0](c)
        got["downsample"] = model.levels[0].downsample(c)
    assert {name: e for name in recorded if (e := relative_error(got[name], recorded[name])) > FORWARD} == {}


def test_one_table_serves_both_a_module_alone_and_a_stage():
    model, recorded = rebuild("v0_hat_internals")
    function = model.levels[2].blocks[0].attn.pos_emb_funct
    with torch.no_grad():
        alone = function(num_leading=4)
        assert torch.equal(alone, gather_bias(bias_tables([function])[0], function.index(), num_leading=4))
    assert relative_error(alone, recorded["bias_attn"]) < FORWARD


def test_three_training_steps():
    model, recorded = rebuild("train3_v0_128")
    optimizer = create_optimizer("adamw", param_groups(model.train(), 0.05), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    losses, norms, errors = [], [], {}
    for step in range(3):
        loss, logits = _loss(model, step)
        loss.backward()
        if step == 0:
            errors["logits_step0_train"] = relative_error(logits, recorded["logits_step0_train"])
            gradients = {f"grad0.{name}": p.grad for name, p in model.named_parameters() if f"grad0.{name}" in recorded}
            errors |= {name: relative_error(gradient, recorded[name]) for name, gradient in gradients.items()}
        norms.append(clip_gradients(model.parameters(), 5.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    errors["loss_after"] = relative_error(_loss(model, 0)[0], recorded["loss_after"])
    state = model.state_dict()
    errors |= {k: relative_error(state[k.removeprefix("after.")], recorded[k]) for k in recorded if k[:6] == "after."}
    errors["loss"] = relative_error(torch.stack(losses), recorded["loss"])
    errors["grad_norm"] = relative_error(torch.stack(norms), recorded["grad_norm"])
    assert errors.keys() == recorded.keys()
    assert {name: e for name, e in errors.items() if e > TRAIN[name.split(".")[0]]} == {}


def _loss(model, step):
    logits = model(imagenet_image(f"fv.tr.x{step}", 4, 3, 128, 128))
    targets = (2 * normal(f"fv.tr.t{step}", 4, 1000)).softmax(dim=1)
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean(), logits


@pytest.mark.parametrize("key", KEYS)
def test_names_shapes_and_kinds_of_all_parameters_and_buffers(key):
    name, _, resolution = key.partition("@")
    overrides = {"window_size": [7, 7, 12, 6]} if "window=7-7-12-6" in resolution else {}
    with torch.device("meta"):
        model = build(name, **overrides)
    buffers = {name for name, _ in model.named_buffers()}
    kinds = {name: "buffer" if name in buffers else "param" for name in model.state_dict()}
    assert [[n, list(t.shape), kinds[n]] for n, t in model.state_dict().items()] == KEYS[key]
    aliases = {n for n, _, kind in KEYS[key] if ".to_global_feature." in n}
    named = {n for n, _ in model.named_parameters()} | buffers
    assert named == set(kinds) - aliases


def test_stochastic_depth_rates():
    _, recorded = load_case("fastervit", "drop_path_rates")
    for name, rates in recorded.items():
        with torch.device("meta"):
            model = build(name)
        ours = [block.drop_path.drop_prob for level in model.levels for block in level.blocks]
        assert relative_error(torch.tensor(ours), rates) < 1e-6
