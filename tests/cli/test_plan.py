"""`python -m cli plan`: of every recipe, before launch, without data, weights and a GPU."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from cli.__main__ import main
from cli.arguments import split
from cli.doctor import build, parse
from recipes import ALL, ROOT, path, smoke_group

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


TRAINED = [name for name in ALL if name != "predict"]
ON_A100_80 = ("cut3r", "vggt", "diffusionsfm", "vit")


LONG = "cut3r_dpt_512_vary_4_64"  # 4 parts, each through all chunks


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == LONG else n for n in TRAINED])
def test_every_recipe_is_planned_without_data_and_without_weights(name, plan):
    small = [] if name.startswith("smoke") else [f"+smoke={smoke_group(name)}"]
    weights = [option for option in ("--model.pretrained", "no/such.ckpt") if "smoke" not in name]
    code, text, record = plan(name, *small, *weights, "--device", "a100-40")
    assert code == 0 and ": fits" in text and "stands for it" not in text, text
    assert record["flops_per_sample"] > 2 * record["forward_flops_per_sample"] * 0.5 > 0
    assert ("model.pretrained=no/such.ckpt" in text) == bool(weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_every_recipe_fits_the_gpus_it_names(name, capfd):
    device = "a100-80" if "A100-80G" in Path(path(name)).read_text() or name.startswith(ON_A100_80) else "a100-40"
    assert main(["plan", "--config", path(name), "--device", device]) == 0
    report = capfd.readouterr().out
    assert ": fits" in report and "GPU-hours" in report


def test_stages_of_a_run_have_a_memory_and_a_time_each(plan):
    _, text, record = plan(
        "diffusionsfm_dense", "+smoke=diffusionsfm", "--trainer.max_steps", "60000", "--trainer.max_epochs", "-1",
        "--device", "a100-40",
    )  # fmt: skip
    frozen, whole = record["phases"]
    assert (frozen["steps"], whole["steps"]) == (50_000, 10_000)
    assert frozen["trained"] < whole["trained"] <= record["parameters"]
    assert frozen["memory"]["total"] < whole["memory"]["total"] == record["memory"]["total"]
    assert frozen["flops_per_step"] < whole["flops_per_step"]
    assert "from step 50,000" in text
    assert record["run"]["hours"] == pytest.approx(sum(phase["hours"] for phase in record["run"]["phases"]))


def test_nodes_and_devices_change_samples_state_and_hours(plan):
    argv = ("smoke_cut3r", "--device", "a100-40")
    one, many = plan(*argv)[2], plan(*argv, "--trainer.num_nodes", "4", "--trainer.devices", "2")[2]
    assert many["samples_per_step"] == 8 * one["samples_per_step"]
    assert many["run"]["steps"] * 8 == one["run"]["steps"] == 4 * 800 // 4
    assert many["run"]["gpu_hours"] == pytest.approx(one["run"]["gpu_hours"])


@pytest.mark.parametrize("name", ["smoke_vggt", pytest.param("smoke_cut3r", marks=pytest.mark.slow)])
def test_multi_view_recipes_are_plotted_by_their_views(name, plan):
    code, _, record = plan(name, "--device", "a100-80", "--plot", "memory.png")
    assert code == 0 and record["curve_unit"].startswith("views per scene")
    totals = [memory["total"] for _, memory in sorted(record["curve"].items(), key=lambda item: int(item[0]))]
    assert len(totals) >= 2 and totals == sorted(totals) and totals[-1] == record["memory"]["total"]
    assert Path("memory.png").is_file()


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


def test_what_does_not_fit_is_said_by_the_exit_code_with_the_largest_that_would(plan):
    code, text, record = plan("vit_finetune", "--device", "a100-40", "--data.batch_size_per_device", "96")
    assert code == 1 and "DOES NOT FIT" in text and record["fits"] is False
    key, most, _ = record["fits_up_to"].split()
    assert key == "data.batch_size_per_device" and record["fits_up_to"] in text
    assert plan("vit_finetune", "--device", "a100-40", f"--{key}", most)[0] == 0
    assert plan("vit_finetune", "--device", "a100-40", f"--{key}", str(int(most) + 3))[0] == 1


def test_scenes_that_fit_are_found_for_multi_view_data(plan):
    code, _, record = plan(
        "diffusionsfm_sparse", "+smoke=diffusionsfm", "data.init_args.shape.init_args.scenes=400000", "--device",
        "a100-40", "--data.epoch_length", "1000000",
    )  # fmt: skip
    assert code == 1 and record["fits_up_to"].startswith("data.shape.init_args.scenes ")
    assert 500 < int(record["fits_up_to"].split()[1]) < 400000


def test_the_size_of_the_data_is_given_assumed_or_missed(plan):
    assert "CUB-200-2011's 5,994 training images are assumed" in plan("vit_finetune")[1]
    code, text, record = plan("quickstart", "--data.data", "data/other")
    assert code == 0 and record["run"] is None and "--samples N gives hours" in text
    code, text, record = plan("quickstart", "--plot", "memory.png")
    assert "digits's 1,437 training images are assumed" in text
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
        (["--config", path("fastervit_0"), "--device", "a100"], "Did you mean a100-40 or a100-80?"),
        (
            ["--config", path("fastervit_0"), "--device", "h20"],
            "unknown device 'h20', expected one of a100-40, a100-80",
        ),
        (["--config", path("fastervit_0"), "--utilisation", "30"], "a share between 0 and 1"),
        (["--config", path("fastervit_0"), "--samples", "0"], "a whole number of 1 or more"),
        (["--config", path("fastervit_0"), "--price_per_gpu_hour", "nan"], "a number above 0"),
        (["--config", path("fastervit_0"), "--plot", "memory.gif"], "ends in .png, .pdf, .svg"),
        (["--config", path("fastervit_0"), "--devise", "h100"], "devise"),
        (["--config", path("fastervit_0"), "--calibrate", "--utilisation", "0.3"], "leave one of them out"),
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


def test_every_reproduction_target_prints_its_plan_before_it_starts():
    makefile = (ROOT / "Makefile").read_text()
    recipes = makefile.partition("##@ Reproduce a paper")[2]
    targets = re.findall(r"^([a-z0-9-]+): \$\(STAMP\)", recipes, flags=re.MULTILINE)
    assert len(targets) > 20
    for target in targets:
        lines = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
        planned, started = lines.index("-m cli plan --config"), lines.index("-m cli fit --config")
        assert planned < started, target
