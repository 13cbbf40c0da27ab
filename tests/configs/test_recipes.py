"""Every recipe composes, is valid, says what its paper says, and trains two steps at smoke size."""

import csv
import math
from pathlib import Path

import pytest
import yaml

from cli import registry
from cli.__main__ import main
from recipes import ALL, CLASSIFIERS, MULTIVIEW, composed, header, path, smoke_group

IMAGENET_TRAIN = 1_281_167
pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice about tiny runs


def effective_batch(config: dict) -> int:
    trainer, per_device = config["trainer"], config["data"]["init_args"]["batch_size_per_device"]
    return trainer["devices"] * trainer["num_nodes"] * per_device * trainer["accumulate_grad_batches"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    assert main(["prepare", "photos", "--out", str(folder), "--train-per-class", "2", "--val-per-class", "1"]) == 0
    return folder


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_composes_and_names_only_known_classes(name):
    config = composed(name)
    registry.check(config)
    assert config["run_dir"] == f"runs/{name}"


@pytest.mark.parametrize("name", CLASSIFIERS + MULTIVIEW)
def test_a_header_says_what_to_expect_and_what_was_measured(name):
    text = header(name)
    for part in ("Expect:", "Measured:", "Hardware:"):
        assert part in text, f"conf/{name}.yaml: no {part} in the header"


# Effective values of the seven published commands.
PUBLISHED = {
    #    optimizer  decay  MESA  start  warm-up  drop-path  seed  first MESA epoch
    0: ("adamw", 0.005, 0.1, 0.25, 20, 0.2, 31, 78),
    1: ("adamw", 0.005, 0.2, 0.25, 20, 0.2, 31, 78),
    2: ("adamw", 0.005, 0.5, 0.25, 20, 0.2, 31, 78),
    3: ("adamw", 0.005, 0.5, 0.30, 35, 0.3, 31, 94),
    4: ("lamb", 0.12, 5.0, 0.25, 20, 0.3, 31, 78),
    5: ("lamb", 0.12, 5.0, 0.25, 20, 0.3, 30, 78),
    6: ("lamb", 0.12, 5.0, 0.25, 20, 0.5, 30, 78),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_fastervit_recipes_hold_the_published_values(variant):
    from callbacks import MESA

    config = composed(f"fastervit_{variant}")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    mesa = config["callbacks"]["mesa"]["init_args"]
    optimizer, decay, ratio, start, warmup, drop_path, seed, first_epoch = PUBLISHED[variant]
    assert model["model_name"] == f"faster_vit_{variant}_224"
    assert (model["optimizer"], model["weight_decay"]) == (optimizer, decay)
    assert (mesa["ratio"], mesa["start_ratio"], mesa["schedule_epochs"]) == (ratio, start, 310)
    assert next(epoch for epoch in range(320) if MESA(**mesa).is_active(epoch)) == first_epoch
    assert (model["warmup_epochs"], model["drop_path_rate"], config["seed_everything"]) == (warmup, drop_path, seed)
    assert (model["lr"], model["warmup_lr"], model["min_lr"]) == (0.005, 1e-6, 5e-6)
    assert (model["betas"], model["eps"]) == ([0.9, 0.999], 1e-8)
    assert (model["schedule_epochs"], trainer["max_epochs"], trainer["gradient_clip_val"]) == (310, 320, 5.0)
    assert trainer["precision"] == "16-mixed"
    assert config["callbacks"]["ema"]["init_args"]["decay"] == 0.9998
    assert (data["mixup"], data["cutmix"], data["switch_prob"], data["mix_prob"]) == (0.8, 1.0, 0.5, 1.0)
    assert (data["label_smoothing"], data["erase_prob"], data["crop_pct"]) == (0.1, 0.25, 0.875)
    assert data["rand_augment"] == "rand-m9-mstd0.5-inc1"
    assert effective_batch(config) == 4096
    assert IMAGENET_TRAIN // 4096 == 312  # updates per epoch, which the recorded learning rates rest on


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.95), (384, 1.0), (512, 1.0), (768, 0.93)])
def test_21k_recipes_keep_the_batch_and_the_papers_schedule(size, crop_pct):
    config = composed(f"fastervit_4_21k_{size}")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert (model["lr"], trainer["max_epochs"], model["drop_path_rate"]) == (7e-5, 60, 0.42)
    assert (data["image_size"], data["crop_pct"], data["crop_mode"]) == (size, crop_pct, "squash")
    assert effective_batch(config) == 4096


def test_presets_take_the_values_of_the_released_files():
    config = composed("fastervit_3", "+preset=fastervit_3_yaml")
    assert config["model"]["init_args"]["weight_decay"] == 0.075
    assert config["callbacks"]["mesa"]["init_args"]["ratio"] == 1.0
    assert config["callbacks"]["mesa"]["init_args"]["start_ratio"] == 0.3


def test_another_model_in_a_recipe_changes_nothing_else():
    ours, other = composed("fastervit_0"), composed("fastervit_0", "model=fastervit_4")
    assert other["model"]["init_args"].pop("model_name") == "faster_vit_4_224"
    assert other["model"]["init_args"].pop("drop_path_rate") == 0.3
    for key in ("model_name", "drop_path_rate"):
        ours["model"]["init_args"].pop(key)
    assert ours == other


@pytest.mark.parametrize("group", ["cpu", "gpu", "ddp_1x8", "ddp_4x8", "slurm", "fsdp"])
def test_a_trainer_group_replaces_the_machine_and_keeps_the_recipe(group):
    trainer = composed("fastervit_0", f"trainer={group}")["trainer"]
    assert trainer["max_epochs"] == 320
    assert trainer["use_distributed_sampler"] is False


@pytest.mark.parametrize("name", CLASSIFIERS + MULTIVIEW)
def test_a_recipe_prints_whole_and_valid(name, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["fit", "--config", path(name), "--print_config"])
    assert leaving.value.code in (0, None)
    text = capsys.readouterr().out
    config = yaml.safe_load(text[text.index("seed_everything") :])
    if name in CLASSIFIERS:
        assert config["model"]["init_args"]["num_classes"] == config["data"]["init_args"]["num_classes"]
    assert config["trainer"]["default_root_dir"] is None  # the run folder is put in at the start
    assert "${" not in text


def logged(run: Path, name: str) -> list[float]:
    """The values of one metric in a run's log."""
    with open(run / "metrics" / "version_0" / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def smoke_run(name: str, run: Path, data: Path) -> int:
    options = [f"+smoke={smoke_group(name)}", "--run_dir", str(run), "--data.data", str(data)]
    return main(["fit", "--config", path(name), *options])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_trains_two_steps_at_smoke_size(name, photos, tmp_path, capsys):
    run = tmp_path / "run"
    assert smoke_run(name, run, photos) == 0, capsys.readouterr()
    losses = logged(run, "train/loss")
    top1 = logged(run, "val/top1_ema" if "ema" in composed(name)["callbacks"] else "val/top1")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert len(top1) == 1 and 0 <= top1[0] <= 1
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert (run / "config_fit.yaml").is_file()


@pytest.mark.parametrize("name", MULTIVIEW)
def test_a_multi_view_recipe_trains_two_steps_at_smoke_size(name, toy_set, tmp_path, capsys):
    """Two optimiser steps, one validation whose metrics are numbers, a checkpoint."""
    run = tmp_path / "run"
    assert smoke_run(name, run, toy_set) == 0, capsys.readouterr()
    losses = logged(run, "train/loss")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    with open(run / "metrics" / "version_0" / "metrics.csv") as file:
        names = [column for column in next(csv.reader(file)) if column.startswith("val/")]
    assert names, "no validation metric was logged"
    assert all(math.isfinite(value) for column in names for value in logged(run, column))
    assert (run / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("option", ["--data.transform.is_training=false", "--data.sampler.init_args.reverse=true"])
def test_one_argument_of_a_nested_class_leaves_the_class_as_the_recipe_has_it(option, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", path("smoke_cut3r"), option, "--print_config"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert data["transform"]["class_path"] == "restrike.data.multiview_transforms.CUT3RViews"
    assert data["sampler"]["class_path"] == "restrike.data.views.WindowViews"
    key, value = option.removeprefix("--data.").split("=")
    assert data[key.split(".")[0]]["init_args"][key.split(".")[-1]] is (value == "true")
