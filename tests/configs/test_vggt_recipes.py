"""VGGT's recipes hold the published values, and their options do what the headers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.__main__ import main
from recipes import composed, path

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice about tiny runs


def part(config: dict[str, Any], key: str) -> dict[str, Any]:
    return config[key]["init_args"]


def test_the_finetuning_recipe_holds_the_released_values():
    config = composed("vggt_co3d_finetune")
    model, data, trainer = part(config, "model"), part(config, "data"), config["trainer"]
    assert model["model_name"] == "vggt_1b_camera_depth" and model["pretrained"]
    assert (model["camera_weight"], model["depth_weight"], model.get("point_weight", 0)) == (5, 1, 0)
    assert (model["camera_distance"], model["depth_surface"], model["valid_range"]) == ("l1", "grad", 0.98)
    assert (model["optimizer"], model["betas"], model["eps"]) == ("adamw", [0.9, 0.999], 1e-8)
    assert (model["weight_decay"], model["decay_all"], model.get("weight_decay_end")) == (0.05, True, None)
    assert (model["lr"], model["warmup_lr"], model["min_lr"]) == (5e-5, 1e-8, 1e-8)
    assert model["schedule"] == "progress_cosine" and model["warmup_epochs"] / trainer["max_epochs"] == 0.05
    assert model["accum_steps"] == 2 and "accumulate_grad_batches" not in trainer
    assert model["clip_by_module"] == {"aggregator": 1.0, "depth": 1.0, "camera": 1.0}
    assert "gradient_clip_val" not in trainer
    assert (trainer["devices"], trainer["max_epochs"], trainer["precision"]) == (4, 20, "bf16-mixed")
    assert trainer["check_val_every_n_epoch"] == 5 and trainer["max_epochs"] % 5 == 0
    assert config["callbacks"]["staged_freezing"]["init_args"]["stages"] == {0: ["net.aggregator.*"]}
    assert "ema" not in config["callbacks"]
    shape = data["shape"]["init_args"]
    assert (shape["min_views"], shape["views"], shape["max_img_per_gpu"]) == (2, 24, 48)
    assert (shape["width"], shape["aspects"]) == (518, [0.33, 1.0])
    assert data["order"] == "independent" and data["steps_per_epoch"] == 800
    assert data["sampler"]["init_args"]["repeat"] is True
    views = data["transform"]["init_args"]
    assert views["scale"] == [0.8, 1.2]
    assert {k: views["jitter"][k] for k in ("prob", "gray_prob", "same_prob")} == {
        "prob": 0.9, "gray_prob": 0.05, "same_prob": 0.7,
    }  # fmt: skip
    assert (data["filter"]["min_frames"], data["seed"], config["seed_everything"]) == (24, 42, 42)
    val = data["val_filter"]
    assert (val["subsets"], val["min_quality"], val["min_frames"]) == (["fewview_dev/test"], 0.5, 50)
    assert data["val_shape"]["views"] == 10 and not data["val_sampler"].get("init_args", {}).get("repeat")


def test_the_recipe_from_scratch_holds_the_papers_values():
    config = composed("vggt_scratch")
    model, data, trainer = part(config, "model"), part(config, "data"), config["trainer"]
    assert model["model_name"] == "vggt_1b" and model["patch_embed_pretrained"]
    assert (model["lr"], model["warmup_steps"], model["schedule"]) == (2e-4, 8000, "cosine")
    assert trainer["max_epochs"] * data["steps_per_epoch"] == 160_000
    assert (model["camera_weight"], model["depth_weight"], model["point_weight"]) == (1, 1, 1)
    assert (model["camera_distance"], model["grad_checkpointing"]) == ("huber", True)
    assert (trainer["gradient_clip_val"], trainer["precision"]) == (1.0, "bf16-mixed")
    assert data["transform"]["init_args"]["jitter"]["same_prob"] == 0
    assert data["shape"]["init_args"]["max_img_per_gpu"] == 48
    assert "staged_freezing" not in config["callbacks"]


def test_views_that_are_not_named_twice_keep_the_released_count(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", path("vggt_co3d_finetune"), "--data.shape.init_args.max_img_per_gpu", "24",
              "--model.accum_steps", "4", "--print_config"])  # fmt: skip
    text = capsys.readouterr().out
    config = yaml.safe_load(text[text.index("seed_everything") :])
    shape = part(config, "data")["shape"]
    shape = shape.get("init_args", shape)
    assert (shape["max_img_per_gpu"], shape["views"], shape["width"]) == (24, 24, 518)
    assert part(config, "model")["accum_steps"] == 4


@pytest.mark.parametrize(
    "option, message",
    [("--model.accum_step", "accum_steps"), ("--model.weight_decays", "weight_decay"), ("--model.lrs", "lr")],
)
def test_a_misspelt_option_names_the_nearest(option, message, capsys):
    assert main(["fit", "--config", path("vggt_co3d_finetune"), option, "3"]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_weight_file_is_one_message(tmp_path, toy_set, capsys):
    options = ["+smoke=vggt", "--data.data", str(toy_set), "--run_dir", str(tmp_path / "run")]
    missing = str(tmp_path / "model.pt")
    assert main(["fit", "--config", path("vggt_co3d_finetune"), *options, "--model.pretrained", missing]) == 2
    assert "model.pt" in capsys.readouterr().err


def test_the_test_command_prints_one_table_with_every_metric(tmp_path, toy_set, capsys):
    run = tmp_path / "run"
    options = ["+smoke=vggt", "--data.data", str(toy_set), "--run_dir", str(run)]
    assert main(["test", "--config", path("vggt_co3d_finetune"), *options]) == 0
    table = (run / "report.md").read_text()
    assert table.strip() in capsys.readouterr().out
    for name in ("rra@5", "rra@15", "rra@30", "rta@5", "rta@15", "rta@30", "auc@3", "auc@5", "auc@10", "auc@30"):
        assert f"| {name} " in table
    for name in ("abs_rel", "delta@1.25", "point_overall"):
        assert f"| {name} " in table
    assert "raw" in table and "trivial" in table
    frozen = json.loads((run / "val_frames.json").read_text())
    assert f"frames: val_frames.json, sha256 {frozen['sha256']}" in table


def test_frozen_frames_give_the_same_numbers_in_another_run(tmp_path, toy_set):
    """The first run draws and writes its frames; the second reads them and draws nothing."""
    reports = []
    for number, more in enumerate(
        ([], ["--data.val_frames", str(tmp_path / "0" / "val_frames.json"), "--data.seed", "7"])
    ):
        run = tmp_path / str(number)
        options = ["+smoke=vggt", "--data.data", str(toy_set), "--run_dir", str(run), *more]
        assert main(["test", "--config", path("vggt_co3d_finetune"), *options]) == 0
        reports.append(json.loads((run / "report.json").read_text()))
    assert reports[0] == reports[1]


def test_the_toy_set_of_the_header_is_the_one_of_its_data_group():
    text = Path(path("smoke_vggt")).read_text()
    commands = [line for line in text.splitlines() if "python -m cli prepare" in line]
    assert len(commands) == 2 and part(composed("smoke_vggt"), "data")["data"] in commands[1]
