"""DiffusionSfM's recipes: published values, the guide's spellings, the switch at 50,000 steps, resuming around it."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import pytest
import torch

from cli.__main__ import main
from cli.arguments import split
from cli.compose import compose_all
from cli.errors import UserError
from cli.guides import MEANINGS, translate_diffusionsfm
from recipes import composed, path

NAMES = ("diffusionsfm_sparse", "diffusionsfm_dense", "diffusionsfm_debug")
pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice about tiny runs

# The guide's commands, after `train.py`: recipe, overrides.
COMMON = ["dataset.name=co3d", "model.num_images=8", "debug.project_name=diffusionsfm_co3d"]
GUIDE = {
    "sparse": [
        "training.batch_size=8", "training.max_iterations=400000", *COMMON,
        "debug.run_name=co3d_diffusionsfm_sparse",
    ],
    "dense": [
        "training.batch_size=4", "training.max_iterations=800000", *COMMON,
        "debug.run_name=co3d_diffusionsfm_dense", "training.dpt_head=True", "training.full_num_patches_x=256",
        "training.full_num_patches_y=256", "training.gradient_clipping=True", "training.reinit=True",
        "training.freeze_encoder=True", "model.freeze_transformer=True",
    ],
    "debug": [
        "training.batch_size=4", "dataset.category=apple", "debug.wandb=False",
    ],
}  # fmt: skip


def smoke(recipe: str, run: Path, data: Path, *argv: str) -> list[str]:
    return ["fit", "--config", path(f"diffusionsfm_{recipe}"), "+smoke=diffusionsfm", "--data.data", str(data), *argv]


def test_the_sparse_recipe_holds_the_published_values():
    config = composed("diffusionsfm_sparse")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert (model["optimizer"], model["lr"], model["betas"], model["eps"]) == ("adam", 1e-4, [0.9, 0.999], 1e-8)
    assert (model["schedule"], model["weight_decay"], trainer["max_steps"]) == ("constant", 0.0, 400000)
    assert trainer["devices"] * data["shape"]["init_args"]["scenes"] == 64
    assert (data["shape"]["init_args"]["views"], data["shape"]["init_args"]["min_views"]) == (8, 2)
    assert data["transform"]["init_args"] == {"depth_size": 16, "scale": [0.8, 1.1]}
    assert data["filter"]["categories"] == ["seen"] and trainer["precision"] == "bf16-mixed"
    assert config["callbacks"]["staged_freezing"]["init_args"]["stages"] == {0: ["net.feature_extractor.*"]}
    assert trainer.get("gradient_clip_val") is None


def test_the_dense_recipe_holds_the_published_values():
    config = composed("diffusionsfm_dense")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert trainer["devices"] * data["shape"]["init_args"]["scenes"] == 32
    assert (trainer["max_steps"], trainer["gradient_clip_val"], model["clipping"]) == (800000, 1.0, "faithful")
    assert data["transform"]["init_args"]["depth_size"] == 256
    assert model["lr_factors"] == {"net.feature_extractor.*": 0.1, "net.ray_predictor.*": 0.1}
    freezing = config["callbacks"]["staged_freezing"]["init_args"]
    assert freezing["unit"] == "step" and model["loss_scale_restart"] == 50000
    assert freezing["stages"] == {0: ["net.feature_extractor.*", "net.ray_predictor.*"], 50000: []}


def test_the_debug_recipe_has_one_gpu_one_category_and_its_own_folder():
    config = composed("diffusionsfm_debug")
    assert config["data"]["init_args"]["filter"]["categories"] == ["apple"]
    assert (config["trainer"]["devices"], config["data"]["init_args"]["shape"]["init_args"]["scenes"]) == (1, 4)
    assert config["run_dir"] == "runs/diffusionsfm_debug" and "wandb" not in config["logger"]


@pytest.mark.parametrize("recipe", GUIDE)
def test_the_guides_commands_run_at_smoke_size(recipe, toy_set, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*smoke(recipe, run, toy_set), *GUIDE[recipe], f"hydra.run.dir={run}"]) == 0, capsys.readouterr()
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == len(GUIDE[recipe]) + 1
    assert f"note: hydra.run.dir={run} is the guide's spelling; here: run_dir={run}" in notes
    assert (run / "checkpoints" / "last.ckpt").is_file() and (run / "config_fit.yaml").is_file()


def test_what_the_guides_spellings_mean():
    arguments = split(["fit", "--config", "conf/diffusionsfm_dense.yaml", "train.resume=True", "hydra.run.dir=runs/x",
                       "training.pretrain_path=sparse.pth", "training.mixed_precision=False", "model.num_images=4",
                       "model.random_num_images=False", "dataset.shape=all_test", "trainer.devices=2"])  # fmt: skip
    assert arguments.options == ["--ckpt_path=last"]
    assert arguments.overrides == [
        "run_dir=runs/x", "model.init_args.sparse_pretrained=sparse.pth", "trainer.precision=32-true",
        "data.init_args.shape.init_args.views=4", "data.init_args.val_shape.views=4",
        "data.init_args.shape.init_args.min_views=null", "data.init_args.filter.categories=[unseen]",
        "data.init_args.val_filter.categories=[unseen]", "data.init_args.test_filter.categories=[unseen]",
        "trainer.devices=2",
    ]  # fmt: skip
    assert split(["fit", "--config", "conf/vggt_scratch.yaml", "training.lr=1"]).overrides == ["training.lr=1"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.dpt_head=True", "another recipe, --config conf/diffusionsfm_dense.yaml"),
        ("model.num_images=1", "needs 2 views or more"),
        ("dataset.name=multi", "only co3d was released"),
        ("training.reinit=False", "callbacks.staged_freezing.init_args.stages"),
    ],
)
def test_spellings_without_a_meaning_here_say_what_to_type(override, message):
    with pytest.raises(UserError, match=message):
        translate_diffusionsfm([override], "conf/diffusionsfm_sparse.yaml")


def states(run: Path) -> dict[str, torch.Tensor]:
    """Weights, and the optimiser's state with the steps that each parameter took."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    found = {f"weight {name}": value for name, value in checkpoint["state_dict"].items()}
    for number, state in checkpoint["optimizer_states"][0]["state"].items():
        found |= {f"optimizer {number} {name}": value for name, value in state.items()}
    found["loss scale"] = torch.tensor(list(checkpoint["loss_scale"].values()))
    return found


def test_a_dense_run_resumed_on_both_sides_of_the_switch_equals_one_that_was_never_stopped(toy_set, tmp_path):
    """Frozen until step 2 of 4; stopped after the first step and after the third."""
    stages = "callbacks.staged_freezing.init_args.stages={0:[net.feature_extractor.*,net.ray_predictor.*],2:[]}"
    line = [stages, "model.init_args.loss_scale_restart=2", "trainer.limit_train_batches=4"]
    line += ["trainer.max_epochs=-1", "trainer.limit_val_batches=0", "callbacks.checkpoint.init_args.monitor=null"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*smoke("dense", whole, toy_set, "--run_dir", str(whole)), *line, "trainer.max_steps=4"]) == 0
    for last, ckpt in ((1, []), (3, ["--ckpt_path", "last"]), (4, ["--ckpt_path", "last"])):
        argv = [*smoke("dense", parts, toy_set, "--run_dir", str(parts)), *line, f"trainer.max_steps={last}", *ckpt]
        assert main(argv) == 0
    one, other = states(whole), states(parts)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    steps = {int(value) for name, value in one.items() if name.endswith(" step")}
    assert steps == {2, 4}  # what rested until the switch has taken two steps, the decoder kept its four
    assert one["loss scale"].tolist() == [65536, 2]


DOCS = (Path(__file__).resolve().parents[2] / "docs" / "models" / "diffusionsfm.md").read_text(encoding="utf-8")


def test_the_docs_name_every_spelling_of_the_guide_that_is_understood():
    short = {"training.full_num_patches_y": "…_y=256"}
    missing = [key for key in MEANINGS if short.get(key, f"`{key}=") not in DOCS]
    assert missing == []


@pytest.mark.parametrize("line", [x for x in DOCS.splitlines() if x.startswith("python -m cli")])
def test_the_commands_of_the_docs_compose(line):
    arguments = split(shlex.split(line, comments=True)[3:])
    assert compose_all(arguments.configs, arguments.overrides).config["model"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_smoke_recipe_memorises_one_sequence(tmp_path):
    """500 steps on one ray-cast sequence: every sampled pair of cameras within 15 degrees."""
    tree, data, run = tmp_path / "tree", tmp_path / "set", tmp_path / "run"
    one = ["--sequences", "1", "--size", "96", "--categories", "apple", "--rooms", "category"]
    assert main(["prepare", "toy", "--out", str(tree), *one]) == 0
    assert main(["prepare", "co3d", "--src", str(tree), "--out", str(data)]) == 0
    line = ["fit", "--config", path("smoke_diffusionsfm"), "--run_dir", str(run), "--data.data", str(data)]
    line += ["data.init_args.val_filter.subsets=[fewview_dev/train]", "+data.init_args.epoch_length=1600"]
    assert main([*line, "trainer.max_steps=500", "~callbacks.progress"]) == 0
    with open(run / "metrics" / "version_0" / "metrics.csv") as file:
        shares = [float(row["val/rra@15"]) for row in csv.DictReader(file) if row["val/rra@15"]]
    assert shares[-1] == 1.0
