"""CUT3R's recipes: the published table, the chain of stages at smoke size, and going on inside a stage."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from cli.__main__ import main
from cli.compose import compose_all
from lightning_modules import RecurrentReconstructionModule
from recipes import ROOT, composed, path
from restrike.models import build

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice about tiny runs

STAGES = ("stage1", "stage2", "stage3", "stage4", "dpt_512_vary_4_64")
COLUMNS = (
    "model", "is_frozen", "lr", "min_lr", "epochs", "warmup", "scenes", "parts", "accumulated", "views", "varies",
    "is_long", "checkpointing", "criterion", "samples", "mixture",
)  # fmt: skip
LINEAR, DPT = "cut3r_224_linear", "cut3r_512_dpt"
# The published values of all six.
TABLE = {
    "stage1": (LINEAR, 0, 1e-4, 1e-6, 100, 10, 16, 1, 1, 4, 0, 0, 0, "static", 32000, 806000),
    "stage2": (LINEAR, 0, 5e-6, 1e-6, 35, 1, 16, 1, 1, 4, 0, 0, 0, "mixed", 48000, 801880),
    "stage3": (DPT, 0, 1e-5, 1e-6, 40, 2, 16, 1, 1, 4, 0, 0, 1, "mixed", 44800, 729248),
    "stage4": (DPT, 1, 1e-6, 1e-7, 10, 0.5, 16, 1, 1, 32, 0, 1, 1, "static", 22400, 398684),
    "dpt_512_vary_4_64": (DPT, 1, 1e-6, 1e-7, 10, 0.5, 16, 4, 1, 64, 1, 1, 1, "mixed", 44800, 756248),
    "linear_224_fixed_16": (LINEAR, 1, 1e-6, 1e-7, 10, 0.5, 6, 1, 2, 16, 0, 0, 0, "mixed", 44800, 797368),
}


SMALL, LONG_SIDE = [[224, 224]], [
    *([height, 512] for height in (384, 336, 288, 256, 208, 144)), *([512, width] for width in (384, 336, 288, 256))
]  # fmt: skip
LINEAR_FILE, DPT_FILE = "weights/cut3r/cut3r_224_linear_4.pth", "weights/cut3r/cut3r_512_dpt_4_64.pth"
REST_COLUMNS = (
    "pretrained", "sizes", "allow_repeat", "val_size", "benchmark", "workers", "save_every_n_steps", "keep_every",
)  # fmt: skip
# The rest of the table; a tenth of an epoch on CO3D alone is 35 and 47 steps.
REST = {
    "stage1": (None, SMALL, False, [224, 224], True, 8, None, 10),
    "stage2": ("runs/cut3r_stage1/checkpoints/last.ckpt", SMALL, False, [224, 224], True, 8, None, 10),
    "stage3": ("runs/cut3r_stage2/checkpoints/last.ckpt", LONG_SIDE, True, [224, 224], True, 8, None, 10),
    "stage4": ("runs/cut3r_stage3/checkpoints/last.ckpt", LONG_SIDE, False, [224, 224], True, 8, None, 10),
    "dpt_512_vary_4_64": (DPT_FILE, LONG_SIDE, True, [384, 512], False, 4, 44800 // (16 * 8) // 10, 1),
    "linear_224_fixed_16": (LINEAR_FILE, SMALL, False, [224, 224], True, 16, round(44800 / (6 * 8 * 2) / 10), 1),
}
# Samples an epoch in the order of TABLE, as published; 0 leaves the data set out.
MIXTURE = """
Co3d_Multi 32000 48000 44800 22400 44800 44800
WildRGBD_Multi 48000 60000 56000 28000 56000 56000
ARKitScenes_Multi 100800 54000 56000 28000 56000 56000
ARKitScenesHighRes_Multi 56000 18000 22400 2800 22400 5600
ScanNetpp_Multi 33600 6000 16800 2800 16800 5600
ScanNet_Multi 56000 42000 38400 70000 22400 140000
HyperSim_Multi 33600 12000 11200 2800 11200 5600
BlendedMVS_Multi 33600 6000 22400 11200 22400 22400
MegaDepth_Multi 33600 6000 22400 8400 22400 16800
MapFree_Multi 100800 60000 84000 28000 84000 56000
Waymo_Multi 78400 48000 20000 21000 56000 42000
VirtualKITTI2_Multi 5000 2400 5600 2800 5600 5600
UnReal4K_Multi 1000 180 168 84 168 168
TartanAir_Multi 33600 18000 56000 42000 56000 84000
DL3DV_Multi 160000 222000 74000 42000 84000 84000
Cop3D_Multi 0 400 480 3600 480 7200
MVImgNet_Multi 0 16000 19200 9600 19200 19200
RE10K_Multi 0 4000 4800 4800 4800 9600
OmniObject3D_Multi 0 32000 0 12000 38400 24000
ThreeDKenBurns 0 4000 4800 0 0 0
IRS 0 2000 2400 0 0 0
SynScapes 0 2000 2400 0 0 0
UrbanSyn 0 500 600 0 0 0
EDEN_Multi 0 12000 0 0 0 0
SmartPortraits_Multi 0 16000 19200 0 0 0
DynamicReplica 0 20000 36000 16800 26400 33600
Spring 0 400 9400 1200 1200 2400
BEDLAM_Multi 0 32000 36000 4800 36000 9600
MVS_Synth_Multi 0 2000 1400 2400 2400 4800
PointOdyssey_Multi 0 20000 7200 14400 24000 28800
UASOL_Multi 0 12000 14400 7200 14400 14400
MP3D_Multi 0 24000 28800 9600 28800 19200
HOI4D_Multi 0 0 12000 0 0 0
"""


@pytest.mark.parametrize("name", TABLE)
def test_mixtures_are_the_published_ones(name):
    column = list(TABLE).index(name) + 1
    rows = [line.split() for line in MIXTURE.strip().splitlines()]
    assert len(rows) == 33
    want = {row[0]: int(row[column]) for row in rows if int(row[column])}
    data = composed(f"cut3r_{name}")["data"]["init_args"]
    assert (data["mixture"], data["use"]) == (want, ["Co3d_Multi"])


@pytest.mark.parametrize("name", TABLE)
def test_recipes_hold_the_rest_of_the_published_table(name):
    config = composed(f"cut3r_{name}")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    got = (
        model.get("pretrained"),
        data["shape"]["init_args"]["sizes"],
        data["sampler"]["init_args"].get("allow_repeat", False),
        data["val_shape"]["size"],
        trainer["benchmark"],
        data.get("num_workers", 8),
        config["callbacks"]["checkpoint"]["init_args"].get("every_n_train_steps"),
        config["callbacks"]["keep_epochs"]["init_args"]["every_n_epochs"],
    )
    assert dict(zip(REST_COLUMNS, got, strict=True)) == dict(zip(REST_COLUMNS, REST[name], strict=True))
    sampler = data["sampler"]["init_args"]
    assert [sampler[n] for n in ("min_interval", "max_interval", "video_prob", "fix_interval_prob")] == [
        1,
        25,
        0.5,
        0.5,
    ]
    assert data["transform"]["init_args"] == {"aug_crop": 16, "background_prob": 0.1, "jitter": {"as_uint8": True}}
    assert data["val_transform"]["init_args"] == {"is_training": False}
    assert (data["val_shape"]["views"], data["mean"], data["std"]) == (4, [0.5] * 3, [0.5] * 3)
    assert (data["seed"], config["seed_everything"], trainer["log_every_n_steps"]) == (0, 0, 10)
    assert data["filter"] | {"max_per_category": 50, "min_quality": 0.5} == data["filter"]
    assert (model["color_weight"], model["float32_matmul_precision"], model["evaluate"]) == (1.0, "high", "raw")
    assert model["released_ray_map"] and not model.get("is_metric", False)  # CO3D's unit is arbitrary
    if name == "stage3":  # pose head and the blocks before the maps come from stage 2
        assert model["pretrained_fresh"][0] == "downstream_head.dpt_*"
    else:
        assert "pretrained_fresh" not in model


@pytest.mark.parametrize("name", TABLE)
def test_recipes_hold_the_published_values(name):
    config = composed(f"cut3r_{name}")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    shape = data["shape"]["init_args"]
    got = (
        model["model_name"],
        "staged_freezing" in config["callbacks"],
        model["lr"],
        model["min_lr"],
        trainer["max_epochs"],
        model["warmup_epochs"],
        shape["scenes"],
        model.get("accum_steps", 1),
        trainer["accumulate_grad_batches"],
        shape["views"],
        shape.get("vary_views", False),
        model.get("long_context", False),
        model.get("grad_checkpointing", False),
        model["criterion"],
        data["mixture"]["Co3d_Multi"],
        sum(data["mixture"].values()),
    )
    assert dict(zip(COLUMNS, got, strict=True)) == dict(zip(COLUMNS, TABLE[name], strict=True))
    assert data["epoch_length"] == data["mixture"]["Co3d_Multi"]
    assert (model["optimizer"], model["betas"], model["eps"], model["weight_decay"]) == (
        "adamw",
        [0.9, 0.95],
        1e-8,
        0.05,
    )
    assert (model["schedule"], model["warmup_lr"], model["alpha"]) == ("progress_cosine", 0.0, 0.2)
    assert (trainer["gradient_clip_val"], trainer["precision"], trainer["devices"]) == (1.0, "bf16-mixed", 8)
    assert trainer["strategy"]["init_args"]["find_unused_parameters"]
    assert (model.get("chunk_views"), model.get("trained_chunks")) == (
        (4, 4) if model.get("long_context") else (None,) * 2
    )


def test_each_stage_starts_from_the_last_ones_weights():
    for before, stage in zip(STAGES[:3], STAGES[1:4], strict=True):
        start = composed(f"cut3r_{stage}")["model"]["init_args"]["pretrained"]
        assert start == f"{composed(f'cut3r_{before}')['run_dir']}/checkpoints/last.ckpt"


@pytest.mark.parametrize(
    "use, message",
    [
        ("[WildRGBD_Multi]", "nothing here reads WildRGBD_Multi yet"),
        ("[Co3d_Multi,ScanNet_Multi]", "nothing here reads ScanNet_Multi yet"),
        ("[Co3d]", "not in data.mixture; nearest: Co3d_Multi"),
    ],
)
def test_a_data_set_that_nothing_reads_is_one_clear_message(use, message, toy_set, tmp_path, capsys):
    options = ["+smoke=cut3r", "--run_dir", str(tmp_path / "run"), "--data.data", str(toy_set)]
    assert main(["fit", "--config", path("cut3r_stage2"), *options, f"data.init_args.use={use}"]) == 2
    assert message in capsys.readouterr().err


def fit(stage: str, run: Path, data: Path, *options: str) -> int:
    smoke = ["+smoke=cut3r", "--run_dir", str(run), "--data.data", str(data)]
    return main(["fit", "--config", path(f"cut3r_{stage}"), *smoke, *options])


def weights(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_the_chain_of_stages_at_smoke_size(toy_set, tmp_path, capsys):
    """Each stage begins with the last one's weights; what a stage adds is new; what it freezes stays."""
    start: list[str] = []
    before: dict[str, Any] = {}
    for stage in STAGES:
        if stage == "stage3":
            start.append("model.init_args.pretrained_fresh=[downstream_head.dpt_*,downstream_head.*proj.*]")
        # Without a rate no weight moves: what the file holds is what the stage begins with.
        start.append("--trainer.limit_val_batches=0")
        still = ["--model.lr=1e-30", "--model.min_lr=0", "--trainer.max_steps=1"]
        assert fit(stage, tmp_path / f"{stage}_start", toy_set, *start, *still) == 0, capsys.readouterr()
        begun = weights(tmp_path / f"{stage}_start")
        assert [n for n in begun if n in before and not torch.equal(begun[n], before[n])] == []
        new = {n.split(".")[2] for n in begun if n not in before} if before else set()
        assert new == ({"dpt_self", "dpt_cross", "dpt_rgb"} if stage == "stage3" else set())
        assert fit(stage, tmp_path / stage, toy_set, *start) == 0, capsys.readouterr()
        before = weights(tmp_path / stage)
        moved = [n for n in before if not torch.equal(before[n], begun[n])]
        assert any(n.startswith("net.dec_blocks_state") for n in moved)
        assert any(n.startswith("net.enc_blocks.") for n in moved) == (stage in STAGES[:3])
        start = [f"--model.pretrained={tmp_path / stage}/checkpoints/last.ckpt"]


class Killed(BaseException):
    """As if the process were gone."""


@pytest.mark.parametrize("stage", ["stage1", "stage4"])
def test_a_run_goes_on_inside_a_stage_as_if_never_stopped(stage, toy_set, tmp_path, capsys, monkeypatch):
    options = ["model=cut3r_224_linear", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=0"]
    saved = "--callbacks.checkpoint.every_n_train_steps=2"
    assert fit(stage, tmp_path / "whole", toy_set, *options) == 0, capsys.readouterr()

    def die(module: RecurrentReconstructionModule, *_: Any) -> None:
        if module.trainer.global_step == 2:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RecurrentReconstructionModule, "on_train_batch_end", die)
        fit(stage, tmp_path / "cut", toy_set, *options, saved)
    assert fit(stage, tmp_path / "cut", toy_set, *options, "--ckpt_path", "last") == 0, capsys.readouterr()
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert [n for n in whole if not torch.equal(whole[n], cut[n])] == []
    # A finished stage is left as it is.
    assert fit(stage, tmp_path / "cut", toy_set, *options, "--ckpt_path", "last") == 0, capsys.readouterr()
    after = weights(tmp_path / "cut")
    assert [n for n in whole if not torch.equal(whole[n], after[n])] == []


def die_at(step: int) -> Any:
    def die(module: RecurrentReconstructionModule, *_: Any) -> None:
        if module.trainer.global_step == step:
            raise Killed

    return die


@pytest.mark.slow
def test_the_chain_goes_on_where_it_was_killed(toy_set, tmp_path, capsys, monkeypatch):
    """As `make cut3r` runs it: all stages with --auto, each from the last one's file; killed inside stage 2."""
    target = subprocess.run(["make", "-n", "cut3r"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "for stage in 1 2 3 4" in target and "conf/cut3r_stage$stage.yaml --auto true" in target
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.limit_train_batches=4", "--trainer.limit_val_batches=0", "model.init_args.test_points=1"]
    saved = "--callbacks.checkpoint.every_n_train_steps=2"

    def stage(number: int) -> int:
        name = f"cut3r_stage{number}"
        start = [f"--model.pretrained=runs/cut3r_stage{number - 1}/checkpoints/last.ckpt"] if number > 1 else []
        options = ["+smoke=cut3r", "--data.data", str(toy_set), "--auto", "true", *short, saved, *start]
        return main(["fit", "--config", path(name), *options])

    assert stage(1) == 0, capsys.readouterr()
    first = Path("runs/cut3r_stage1/checkpoints/last.ckpt")
    begun = weights(first.parents[1])
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RecurrentReconstructionModule, "on_train_batch_end", die_at(3))
        stage(2)
    for number in (1, 2):
        assert stage(number) == 0, capsys.readouterr()
    assert [n for n, x in begun.items() if not torch.equal(x, weights(first.parents[1])[n])] == []
    cut = weights(Path("runs/cut3r_stage2"))
    Path("runs/cut3r_stage2").rename("runs/cut")
    assert stage(2) == 0, capsys.readouterr()
    whole = weights(Path("runs/cut3r_stage2"))
    assert [n for n in whole if not torch.equal(whole[n], cut[n])] == []


def test_a_stage_without_its_predecessor_is_one_clear_error(toy_set, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = "--model.pretrained=runs/cut3r_stage1/checkpoints/last.ckpt"
    assert fit("stage2", tmp_path / "run", toy_set, start) == 2
    said = capsys.readouterr().err
    assert "runs/cut3r_stage1/checkpoints/last.ckpt" in said and "Traceback" not in said
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("recipe, head", [("dpt_512_vary_4_64", DPT), ("linear_224_fixed_16", LINEAR)])
def test_both_fine_tunings_start_from_a_file_in_the_released_layout(recipe, head, toy_set, tmp_path, capsys):
    sizes = compose_all([path(f"cut3r_{recipe}")], ["+smoke=cut3r"]).config["model"]["init_args"]["model_args"]
    torch.manual_seed(5)
    state = {f"module.{n}": p for n, p in build(head, **sizes).state_dict().items()}
    settings = OmegaConf.create({"model": "ARCroco3DStereo(ARCroco3DStereoConfig(...))", "num_views": 64})
    torch.save({"args": settings, "model": state, "epoch": 9}, tmp_path / "released.pth")
    options = [f"--model.pretrained={tmp_path / 'released.pth'}", "--trainer.limit_val_batches=0"]
    if head == LINEAR:
        # The first step's rate is 0, so two steps are needed.
        options += ["--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=4"]
    assert fit(recipe, tmp_path / "run", toy_set, *options) == 0, capsys.readouterr()
    now = weights(tmp_path / "run")
    frozen = {n for n in state if n.startswith(("module.enc_", "module.patch_embed", "module.masked_"))}
    for name, start in state.items():
        same = torch.equal(now[f"net.{name.removeprefix('module.')}"], start)
        assert same or name not in frozen
    assert not torch.equal(now["net.dec_blocks.0.mlp.fc1.weight"], state["module.dec_blocks.0.mlp.fc1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("with_ema", [False, True], ids=["raw", "ema"])
def test_long_sequences_of_varying_length_resume_in_mid_epoch_with_averaged_weights(
    with_ema, toy_set, tmp_path, capsys, monkeypatch
):
    options = [
        "model=cut3r_224_linear", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=0",
        "data.init_args.shape.init_args.vary_views=true", "--trainer.max_epochs=2",
        "--callbacks.checkpoint.every_n_train_steps=3",
        "callbacks.keep_epochs.init_args.every_n_epochs=1",
    ]  # fmt: skip
    options += ["+callbacks@callbacks=ema"] if with_ema else []
    stage = "dpt_512_vary_4_64"
    assert fit(stage, tmp_path / "whole", toy_set, *options) == 0, capsys.readouterr()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RecurrentReconstructionModule, "on_train_batch_end", die_at(6))
        fit(stage, tmp_path / "cut", toy_set, *options)
    assert fit(stage, tmp_path / "cut", toy_set, *options, "--ckpt_path", "last") == 0, capsys.readouterr()
    files = [torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "cut")]
    assert same_content(*(file["state_dict"] for file in files))
    assert same_content(*(file["optimizer_states"] for file in files))
    if with_ema:
        (one, two) = ({n: x for n, x in file["callbacks"].items() if n.startswith("EMA")} for file in files)
        assert one and same_content(one, two)
    kept = sorted(file.name for file in (tmp_path / "cut/checkpoints").glob("epoch*.ckpt"))
    assert kept == ["epoch0000.ckpt", "epoch0001.ckpt"]


def same_content(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same_content(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same_content, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else bool(one == two)
