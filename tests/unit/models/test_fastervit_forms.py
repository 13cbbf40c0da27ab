"""A FasterViT that has been trained can be copied, mixed in precision, deployed, compiled and exported."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from restrike.models.fastervit import blocks, positions
from tiny_models import random_images, tiny_fastervit

IMAGES = random_images(2, 3, 128, 128)


@pytest.fixture
def trained():
    """After two training steps, in eval mode."""
    torch.manual_seed(0)
    model = tiny_fastervit().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(2):
        model(IMAGES).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@torch.no_grad()
def relative_error(model, other, images=IMAGES):
    ours, theirs = model(images).double(), other(images).double()
    return float((ours - theirs).norm() / theirs.norm())


def test_copies_and_pickles_are_the_same_model(trained):
    file = io.BytesIO()
    torch.save(trained, file)
    file.seek(0)
    for twin in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained)), torch.load(file, weights_only=False)):
        assert relative_error(twin, trained) == 0
        twin.train()(IMAGES).sum().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("name", ["faster_vit_0_224", "faster_vit_3_224"])
def test_autocast(name, dtype, tolerance):
    model = tiny_fastervit(name)
    with torch.autocast("cpu", dtype=dtype):
        model.train()(IMAGES).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    plain = copy.deepcopy(model.eval())
    deployed = copy.deepcopy(model).switch_to_deploy()
    for form in (model, deployed):
        with torch.autocast("cpu", dtype=dtype), torch.no_grad():
            logits = form(IMAGES)
        with torch.no_grad():
            expected = plain(IMAGES)
        assert logits.dtype == dtype
        assert (logits.float() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float64, 1e-6)])
def test_other_precisions(trained, dtype, tolerance):
    converted = copy.deepcopy(trained).to(dtype)
    with torch.no_grad():
        logits, expected = converted(IMAGES.to(dtype)), trained(IMAGES)
    assert logits.dtype == dtype and (logits - expected).norm() / expected.norm() < tolerance


def test_memory_layout_of_the_input_does_not_matter(trained):
    with torch.no_grad():
        assert torch.equal(trained(IMAGES.contiguous(memory_format=torch.channels_last)), trained(IMAGES))
    assert relative_error(copy.deepcopy(trained).to(memory_format=torch.channels_last), trained) < 1e-5


@pytest.mark.parametrize("name", ["faster_vit_0_224", "faster_vit_3_any_res"])
def test_inference_form_computes_the_same(name):
    model = tiny_fastervit(name)
    model.train()(IMAGES)
    deployed = copy.deepcopy(model).switch_to_deploy()
    model.eval()
    assert relative_error(deployed, model) < 1e-5
    with torch.no_grad():
        features = [m.forward_features(IMAGES) for m in (deployed, model)]
    assert torch.allclose(*features, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.patch_embed.modules())
    if "any_res" in name:
        for size in ((200, 130), (32, 32)):
            assert relative_error(deployed, model, random_images(1, 3, *size)) < 1e-5


def test_inference_form_is_final(trained):
    state = trained.state_dict()
    deployed = trained.switch_to_deploy()
    logits = deployed(IMAGES)
    assert deployed.switch_to_deploy() is deployed and torch.equal(deployed(IMAGES), logits)
    assert not any(p.requires_grad for p in deployed.parameters())
    deployed.eval()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        deployed.train()
    with pytest.raises(ValueError, match="build it again"):
        deployed.load_state_dict(state)


def test_inference_form_can_be_copied_and_moved(trained):
    deployed = copy.deepcopy(trained).switch_to_deploy()
    for twin in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        assert relative_error(twin, deployed) == 0
        assert all(level.position_cache._frozen for level in twin.levels[2:])
    assert deployed.double()(IMAGES.double()).dtype == torch.float64
    assert next(iter(deployed.levels[2].position_cache._frozen.values()))[0].bias.dtype == torch.float64


def test_both_ways_to_compute_attention_agree():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 13, 7, generator=generator).unbind(0)
    bias = torch.randn(1, 4, 13, 13, generator=generator)
    plain = blocks.biased_attention(q, k, v, bias, 0.3, nn.Dropout(0.0))
    with torch.no_grad():
        fused = blocks.biased_attention(q, k, v, bias, 0.3, nn.Dropout(0.0))
    padded = blocks.fused_attention(q, k, v, bias, 0.3, multiple=8)  # what heads of 49 channels need on a GPU
    assert torch.allclose(plain, fused, atol=1e-6) and torch.allclose(plain, padded, atol=1e-6)


def test_positional_mlps_may_be_computed_together():
    mlps = [positions.CoordinateMlp(5) for _ in range(3)]
    points = positions.token_coordinates((3, 4))
    together = positions._all_at_once(mlps, points)
    assert torch.allclose(together, positions.stacked_mlp(mlps, points), atol=1e-5) and together.shape == (3, 12, 5)


def test_forward_on_the_meta_device_gives_shapes():
    assert tiny_fastervit().to("meta")(IMAGES.to("meta")).shape == (2, 10)


def test_attention_dropout_acts_in_training_only():
    q = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(1, 1, 64, 64)
    dropout = nn.Dropout(0.5)
    torch.manual_seed(0)
    dropped = blocks.biased_attention(q, q, q, bias, 1.0, dropout)
    assert not torch.allclose(dropped, blocks.biased_attention(q, q, q, bias, 1.0, dropout.eval()))


def test_program_export_with_any_batch_size(trained):
    for model in (trained, copy.deepcopy(trained).switch_to_deploy()):
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(model, (IMAGES,), dynamic_shapes=(batch,))
        assert relative_error(program.module(), model, random_images(5, 3, 128, 128)) < 1e-5


@pytest.mark.slow
def test_onnx_export_with_any_batch_size(trained, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    for model in (trained, copy.deepcopy(trained).switch_to_deploy()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = {0: torch.export.Dim("batch", min=1, max=64)}
            torch.onnx.export(model, (IMAGES,), dynamo=True, dynamic_shapes=(batch,), verbose=False).save(
                tmp_path / "model.onnx"
            )
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        images = random_images(5, 3, 128, 128)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_forward_and_gradients():
    trained = tiny_fastervit(depths=(1, 1, 1, 1)).eval()
    compiled = torch.compile(trained, fullgraph=True)
    deployed = torch.compile(copy.deepcopy(trained).switch_to_deploy(), fullgraph=True)
    assert relative_error(compiled, trained) < 1e-5
    assert relative_error(deployed, trained) < 1e-5

    eager, blockwise = copy.deepcopy(trained), copy.deepcopy(trained)
    for level in blockwise.levels:
        for block in level.blocks:
            block.compile()
    gradients = []
    for model in (eager, blockwise):
        model(IMAGES).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-4
    assert list(blockwise.state_dict()) == list(trained.state_dict())
