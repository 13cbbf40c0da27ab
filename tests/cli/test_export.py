"""`python -m cli export`: from a run or a published file to what other tools read; mistakes are one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import restrike
from cli.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ["--config", str(ROOT / "conf" / "quickstart.yaml"), "+smoke=fastervit"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of two steps, tested."""
    root = tmp_path_factory.mktemp("export")
    photos, folder = root / "photos", root / "tiny"
    assert main(["prepare", "photos", "--out", str(photos), "--train-per-class", "1", "--val-per-class", "1"]) == 0
    where = ["--data.data", str(photos), "--run_dir", str(folder)]
    assert main(["fit", *RECIPE, *where]) == 0
    assert main(["test", *RECIPE, *where, "--ckpt_path", "last"]) == 0
    return folder


def export(run: Path, out: Path, form: str, *more: str) -> int:
    saved = ["--config", str(run / "config_fit.yaml"), "--run_dir", str(run)]
    return main(["export", *saved, "--format", form, "--out", str(out), *more])


def card_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("weights", [None, "ema", "raw"])
def test_weights_and_numbers_are_those_of_the_checkpoint(run, tmp_path, weights):
    more = ["--weights", weights] if weights else []
    out = tmp_path / "tiny.safetensors"
    assert export(run, out, "safetensors", "--ckpt_path", "last", *more, "--licence", "CC BY 4.0") == 0
    card, report = card_of(out), json.loads((run / "report.json").read_text())
    suffix = "" if weights == "raw" else "_ema"
    assert card["weights"] == (weights or "ema") and card["recipe"] == "tiny" and card["licence"] == "CC BY 4.0"
    assert json.loads(card["metrics"]) == {
        f"test/{name}": report[f"test/{name}{suffix}"] for name in ("loss", "top1", "top5")
    }
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state = content["state_dict"] if weights == "raw" else content["callbacks"]["EMA"]["shadow"]
    expected = next(value for name, value in state.items() if name.endswith("head.weight"))
    with safe_open(out, framework="pt") as file:
        assert torch.equal(file.get_tensor("head.weight"), expected)


def test_numbers_of_another_checkpoint_are_not_claimed(run, tmp_path):
    best = next((run / "checkpoints").glob("best*.ckpt"))
    assert export(run, tmp_path / "best.safetensors", "safetensors", "--ckpt_path", str(best)) == 0
    assert json.loads(card_of(tmp_path / "best.safetensors")["metrics"]) == {}


def test_a_hub_folder_comes_back(run, tmp_path):
    assert export(run, tmp_path / "hub", "hub", "--ckpt_path", "last") == 0
    net = restrike.from_pretrained(tmp_path / "hub")
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 16)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["restrike"]["preprocessing"]["image_size"] == 64
    assert config["restrike"]["code_version"].startswith(restrike.__version__)


def test_a_published_file_goes_out_as_a_graph(run, tmp_path, capsys):
    published = next((run / "weights").glob("*.pth.tar"))
    assert export(run, tmp_path / "tiny.pt2", "torch-export", "--model.pretrained", str(published), "--deploy") == 0
    assert "logits: largest error" in capsys.readouterr().out
    graph = torch.export.load(tmp_path / "tiny.pt2").module()
    assert graph(torch.zeros(3, 3, 64, 64))[0].shape == (3, 16)


@pytest.mark.slow
def test_onnx_runs_elsewhere(run, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    assert export(run, tmp_path / "tiny.onnx", "onnx", "--ckpt_path", "last") == 0
    session = runtime.InferenceSession(str(tmp_path / "tiny.onnx"))
    assert session.run(None, {"images": torch.zeros(5, 3, 64, 64).numpy()})[0].shape == (5, 16)


def test_a_recipe_from_conf_will_do_too(run, tmp_path):
    out = tmp_path / "tiny.safetensors"
    line = ["export", *RECIPE, "--run_dir", str(run), "--ckpt_path", "last", "--format", "safetensors"]
    assert main([*line, "--out", str(out)]) == 0
    assert card_of(out)["recipe"] == "quickstart"


def refused(capsys, code: int) -> str:
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def test_what_exists_is_not_overwritten(run, tmp_path, capsys):
    out = tmp_path / "there.safetensors"
    out.write_text("mine")
    assert "never overwrites" in refused(capsys, export(run, out, "safetensors", "--ckpt_path", "last"))
    assert out.read_text() == "mine"


def test_a_checkpoint_without_an_average_is_named(run, tmp_path, capsys):
    from restrike.checkpoints import save_released

    hub = tmp_path / "hub"
    assert export(run, hub, "hub", "--ckpt_path", "last") == 0
    save_released(tmp_path / "raw.pth.tar", restrike.from_pretrained(hub))
    line = [run, tmp_path / "x.safetensors", "safetensors", "--ckpt_path", str(tmp_path / "raw.pth.tar")]
    assert "no EMA weights: export --weights raw" in refused(capsys, export(*line, "--weights", "ema"))
    assert export(*line) == 0  # without being asked it takes what there is
    assert card_of(tmp_path / "x.safetensors")["weights"] == "raw"


def test_a_checkpoint_of_another_family_is_named(run, tmp_path, capsys):
    from restrike.checkpoints import save_released
    from tiny_vggt import tiny_vggt

    save_released(tmp_path / "vggt.pth.tar", tiny_vggt())
    code = export(run, tmp_path / "x.safetensors", "safetensors", "--ckpt_path", str(tmp_path / "vggt.pth.tar"))
    assert "Is it another variant?" in refused(capsys, code) and not (tmp_path / "x.safetensors").exists()


def test_a_damaged_checkpoint_is_named(run, tmp_path, capsys):
    damaged = tmp_path / "damaged.ckpt"
    shutil.copy(run / "checkpoints" / "last.ckpt", damaged)
    with damaged.open("r+b") as file:
        file.seek(50_000)
        file.write(b"!!!!")
    code = export(run, tmp_path / "x.safetensors", "safetensors", "--ckpt_path", str(damaged))
    assert "damaged.ckpt' is damaged" in refused(capsys, code)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "needs trained weights"),
        (["--ckpt_path", "nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        (["--ckpt_path", "last", "--weights", "best"], "invalid choice: 'best'"),
        (["--ckpt_path", "last", "--image_size", "64", "64", "64"], "one side, or height and width"),
        (["--ckpt_path", "last", "--model.lrr", "1"], "did you mean 'model.init_args.lr'"),
        (["--ckpt_path", "last", "--ckpt", "1"], "--ckpt"),
    ],
)
def test_mistakes_are_one_message(run, tmp_path, capsys, options, message):
    error = refused(capsys, export(run, tmp_path / "x.safetensors", "safetensors", *options))
    assert message.lower() in error.lower()


def test_a_wrong_ending_or_format_is_named(run, tmp_path, capsys):
    assert "ends in .onnx" in refused(capsys, export(run, tmp_path / "x.pth", "onnx", "--ckpt_path", "last"))
    assert "invalid choice: 'pickle'" in refused(capsys, export(run, tmp_path / "x", "pickle"))
    assert "--config conf/" in refused(capsys, main(["export", "--format", "hub", "--out", str(tmp_path / "x")]))


def test_a_size_that_the_network_does_not_take_is_named(run, tmp_path, capsys):
    line = [run, tmp_path / "x.pt2", "torch-export", "--ckpt_path", "last", "--image_size", "40"]
    assert "cannot carry FasterViT at [2, 3, 40, 40]" in refused(capsys, export(*line))


def test_help_lists_the_formats(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "restrike.from_pretrained(folder)" in capsys.readouterr().out
