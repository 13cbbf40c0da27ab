"""Graphs for other runtimes compute what the network computes, at any batch size."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from restrike.export import ExportError, ModelCard, save_onnx, save_program
from restrike.export.graph import TOLERANCE, check_outputs, example_images, trace
from restrike.models import list_models
from tiny_models import SIDE, tiny_fastervit
from tiny_vggt import CAMERA_DEPTH, tiny_vggt

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn of their own insides
CARD = ModelCard("faster_vit_0_224", {"num_classes": 10}, recipe="tiny")


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).abs().max() / ours.abs().max())


def session(path):
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("is_deployed", [False, True])
def test_a_program_takes_any_batch_and_carries_its_card(tmp_path, is_deployed):
    net = tiny_fastervit("faster_vit_0_224")
    expected = tiny_fastervit("faster_vit_0_224").eval()
    if is_deployed:
        net.switch_to_deploy()
    errors = save_program(net, tmp_path / "net.pt2", CARD, example_images(net, (SIDE, SIDE)))
    assert errors["logits"] <= TOLERANCE
    extra = {"model_card.json": ""}
    graph = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    card = json.loads(extra["model_card.json"])
    assert card["outputs"] == ["logits"] and card["restrike"]["recipe"] == "tiny"
    with torch.no_grad():
        for batch in (1, 5):
            x = images(batch, 3, SIDE, SIDE)
            assert error(graph(x)[0], expected(x)) <= 1e-5
    assert net.training is not is_deployed  # as it was before


@pytest.mark.parametrize("name", ["faster_vit_3_224", "faster_vit_4_21k_224"])
def test_onnx_takes_any_batch_and_carries_its_card(tmp_path, name):
    net, expected = tiny_fastervit(name), tiny_fastervit(name).eval()
    save_onnx(net, tmp_path / "net.onnx", CARD, example_images(net, (SIDE, SIDE)))
    run = session(tmp_path / "net.onnx")
    assert run.get_inputs()[0].shape == ["batch", 3, SIDE, SIDE]
    assert run.get_modelmeta().custom_metadata_map["model_name"] == "faster_vit_0_224"
    for batch in (1, 5):
        x = images(batch, 3, SIDE, SIDE)
        with torch.no_grad():
            assert error(torch.from_numpy(run.run(["logits"], {"images": x.numpy()})[0]), expected(x)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models("fastervit"))
def test_every_fastervit_can_be_written_as_onnx(tmp_path, name):
    net = tiny_fastervit(name).eval()
    errors = save_onnx(net, tmp_path / "net.onnx", CARD, example_images(net, (SIDE, SIDE)))
    assert errors["logits"] <= TOLERANCE


def test_an_image_that_is_not_square_keeps_its_shape(tmp_path):
    net = tiny_fastervit("faster_vit_0_any_res").eval()
    graph, names = trace(net, example_images(net, (96, 160)), "torch-export")
    x = images(3, 3, 96, 160)
    with torch.no_grad():
        assert names == ["logits"] and error(graph.module()(x)[0], net(x)) <= 1e-5


def test_a_vggt_graph_takes_any_number_of_scenes_and_views(tmp_path):
    net = tiny_vggt(enable_track=True, enable_point=False)
    save_program(net, tmp_path / "net.pt2", CARD, example_images(net, (70, 56)))
    extra = {"model_card.json": ""}
    graph = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    names = json.loads(extra["model_card.json"])["outputs"]
    assert names == ["pose_enc", "depth", "depth_conf"]  # tracks need query points
    for shape in ((1, 1), (2, 5), (1, 12)):
        x = images(*shape, 3, 70, 56)
        with torch.no_grad():
            expected = net(x)
            for name, found in zip(names, graph(x), strict=True):
                assert error(found, expected[name]) <= 1e-5, (name, shape)


@pytest.mark.slow
def test_a_vggt_as_onnx_takes_any_number_of_scenes_and_views(tmp_path):
    net = tiny_vggt(**CAMERA_DEPTH)
    save_onnx(net, tmp_path / "net.onnx", CARD, example_images(net, (70, 56)))
    run = session(tmp_path / "net.onnx")
    assert run.get_inputs()[0].shape[:2] == ["batch", "views"]
    x = images(2, 5, 3, 70, 56)
    with torch.no_grad():
        expected = net(x)
    for output, found in zip(run.get_outputs(), run.run(None, {"images": x.numpy()}), strict=True):
        assert error(torch.from_numpy(found), expected[output.name]) <= 1e-4, output.name


class Branching(nn.Module):
    """Looks at its numbers, which no graph can."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((1, 2, 3), keepdim=True)[:, 0, 0] * (2.0 if float(x.sum()) > 0 else 1.0)


class FixedBatch(nn.Module):
    """Works for two images only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)[:, :4]


class Recurrent(nn.Module):
    family = "cut3r"


@pytest.mark.parametrize("net", [Branching(), FixedBatch()])
@pytest.mark.parametrize("save, suffix", [(save_program, "pt2"), (save_onnx, "onnx")])
def test_what_a_graph_cannot_hold_is_refused_and_nothing_is_written(tmp_path, net, save, suffix):
    with pytest.raises(ExportError, match=f"cannot carry {type(net).__name__} .*export it as safetensors or hub"):
        save(net, tmp_path / f"net.{suffix}", CARD, images(2, 3, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_needs_more_than_images_is_refused():
    with pytest.raises(ExportError, match="onnx cannot carry Recurrent: .* more than images"):
        example_images(Recurrent(), (8, 8), "onnx")


def test_a_graph_that_computes_something_else_is_refused():
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    x = images(2, 3, 4, 4)
    assert check_outputs(lambda batch: [net(batch)], net, x, ["logits"], "onnx")["logits"] == 0
    for wrong in (lambda b: [net(b) * 1.001], lambda b: [net(b) * torch.nan], lambda b: [net(b[:1])]):
        with pytest.raises(ExportError, match="differs from the network by .* in 'logits'"):
            check_outputs(wrong, net, x, ["logits"], "onnx")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"onnx, onnxscript: pip install 'restrike\[onnx\]'"):
        save_onnx(nn.Identity(), tmp_path / "net.onnx", CARD, images(2, 3, 4, 4))
