"""`python -m cli plan`: of every classifier's recipe, before launch, without data and without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cli.__main__ import main
from cli.arguments import split
from cli.doctor import build, parse
from recipes import CLASSIFIERS, path

pytestmark = pytest.mark.filterwarnings("ignore:.*")


@pytest.fixture
def plan(tmp_path, capfd, monkeypatch):
    """Runs it; (exit code, what it printed, the JSON)."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *argv: str) -> tuple[int, str, dict]:
        capfd.readouterr()
        code = main(["plan", "--config", path(name), "--json", "plan.json", *argv])
        out, err = capfd.readouterr()
        file = Path("plan.json")
        return code, out + err, json.loads(file.read_text()) if file.exists() else {}

    return run


LARGE = {name for name in CLASSIFIERS if name.startswith(("fastervit_3", "fastervit_4", "fastervit_5", "fastervit_6"))}
QUICK = {"fastervit_4_21k_768"}  # the one with accumulation and large tables
SWEPT = [
    pytest.param(name, marks=pytest.mark.slow) if name in LARGE - QUICK else name
    for name in CLASSIFIERS
    if not name.startswith("quickstart")
]


@pytest.mark.parametrize("name", SWEPT)
def test_every_classifiers_recipe_fits_the_gpus_it_names(name, capfd):
    text = Path(path(name)).read_text()
    device = "a100-80" if "A100-80G" in text else "a100-40"
    assert main(["plan", "--config", path(name), "--device", device]) == 0
    report = capfd.readouterr().out
    assert ": fits" in report and "GPU-hours" in report


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoke_vggt", "smoke_cut3r"])
def test_multi_view_recipes_are_planned_by_their_views(name, plan):
    code, text, record = plan(name, "--device", "a100-80", "--plot", "memory.png")
    assert code == 0 and record["memory"]["activations"] > 0 and record["curve_unit"] == "views per scene"
    totals = [memory["total"] for _, memory in sorted(record["curve"].items(), key=lambda item: int(item[0]))]
    assert len(totals) >= 2 and totals == sorted(totals)


def test_parameters_are_exact_and_state_follows_from_them(plan):
    code, _, record = plan("fastervit_0", "--device", "a100-40", "--price_per_gpu_hour", "2", "~callbacks.mesa")
    with torch.device("meta"):
        net = build(parse(split(["fit", "--config", path("fastervit_0")])).model).net
    weights = sum(p.numel() for p in net.parameters())
    assert code == 0 and record["parameters"] == record["trained"] == weights
    memory = record["memory"]
    assert memory["gradients"] == 4 * weights  # as views of DDP's buckets
    assert memory["optimizer"] == pytest.approx(8 * weights, rel=0.01)
    assert memory["average"] == pytest.approx(memory["weights"], rel=0.01)
    assert record["samples_per_step"] == 4096
    run = record["run"]
    assert run["steps"] == 312 * 320
    assert run["gpu_hours"] == pytest.approx(32 * run["hours"]) and run["price"] == pytest.approx(2 * run["gpu_hours"])


def test_mesa_costs_a_teacher_in_the_epochs_that_have_it(plan):
    with_teacher = plan("fastervit_0", "--utilisation", "0.1")[2]["run"]
    without = plan("fastervit_0", "--utilisation", "0.1", "~callbacks.mesa")[2]["run"]
    taught = sum(epoch / 310 > 0.25 for epoch in range(320)) / 320
    assert without["utilisation"] == pytest.approx(0.1)
    assert with_teacher["hours"] / without["hours"] == pytest.approx(1 + taught / 3, rel=0.02)
    assert with_teacher["step_s"] / without["step_s"] == pytest.approx(4 / 3, rel=0.02)


def test_smaller_batches_checkpointing_and_sharding_are_followed(plan):
    _, _, whole = plan("vit_finetune")
    _, _, half = plan("vit_finetune", "--data.batch_size_per_device", "8")
    _, _, again = plan("vit_finetune", "--model.grad_checkpointing", "true")
    _, text, split_up = plan("vit_finetune", "trainer=fsdp")
    activations = whole["memory"]["activations"]
    assert half["memory"]["activations"] == pytest.approx(activations / 2, rel=0.1)
    assert again["memory"]["activations"] < activations / 2
    assert again["flops_per_sample"] > 1.2 * whole["flops_per_sample"]
    assert split_up["memory"]["optimizer"] == pytest.approx(whole["memory"]["optimizer"] / 8, rel=0.01)
    assert "fsdp" in text


def test_a_frozen_backbone_is_not_trained(plan):
    _, _, record = plan("vit_finetune", "--freeze_backbone")
    assert record["trained"] == 200 * 768 + 200
    assert record["flops_per_sample"] == pytest.approx(record["forward_flops_per_sample"], rel=0.01)


def test_what_does_not_fit_is_said_by_the_exit_code(plan):
    code, text, record = plan("vit_finetune", "--device", "a100-40", "--data.batch_size_per_device", "96")
    assert code == 1 and "DOES NOT FIT" in text and record["fits"] is False


def test_the_size_of_the_data_is_given_assumed_or_missed(plan):
    assert "CUB-200-2011's 5,994 training images are assumed" in plan("vit_finetune")[1]
    code, text, record = plan("quickstart")
    assert code == 0 and record["run"] is None and "--samples N gives hours" in text
    code, text, record = plan("quickstart", "--samples", "1437", "--plot", "memory.png")
    assert record["run"]["steps"] == 24 * (1437 // 64)
    assert Path("memory.png").is_file()
    totals = [record["curve"][size]["total"] for size in ("16", "32", "64", "128")]
    assert totals == sorted(totals) and totals[2] == record["memory"]["total"]


def test_a_calibration_measures_a_step_here(plan):
    _, _, record = plan("quickstart", "--samples", "1437", "--calibrate", "--data.batch_size_per_device", "8")
    assert record["run"]["step_s"] > 0 and record["device"]["name"].startswith("this CPU")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "--config conf"),
        (["--config", path("fastervit_0"), "--device", "a101"], "invalid choice: 'a101'"),
        (["--config", path("fastervit_0"), "--utilisation", "30"], "a share between 0 and 1"),
        (["--config", path("fastervit_0"), "--calibrate"], "add --device cpu"),
        (["--config", path("fastervit_0"), "--model.model_name", "faster_vit_9_224"], "unknown model_name"),
    ],
)
def test_a_mistake_is_one_message(argv, expected, capsys):
    assert main(["plan", *argv]) == 2
    assert expected in capsys.readouterr().err


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["plan", "--help"])
    assert leaving.value.code == 0
    assert "--price_per_gpu_hour" in capsys.readouterr().out
