"""`doctor --draw`: samples of a multi-view recipe, of the toy set and of one's own scenes, as pictures and a page."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli.__main__ import main
from cli.draw import DrawOptions, draw, scene_views, take_options
from cli.errors import UserError
from own_scene_layouts import shots, write_photos, write_transforms
from restrike.data.samples import MultiViewBatch

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"vggt": "vggt_co3d_finetune", "cut3r": "cut3r_stage1", "diffusionsfm": "diffusionsfm_sparse"}
Doctor = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.filterwarnings("ignore:.*")


@pytest.fixture
def doctor(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Runs it on the smoke form of a multi-view recipe; (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, family: str = "vggt") -> tuple[int, str, str]:
        capfd.readouterr()
        recipe = [str(ROOT / "conf" / f"{RECIPES[family]}.yaml"), f"+smoke={family}"]
        code = main(["doctor", "--config", *recipe, "--model.pretrained", "null", "--run_dir", "run", *argv])
        return code, *capfd.readouterr()

    return run


def scenes_of(page: Path) -> list[dict]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])["scenes"]


def test_samples_of_both_splits_are_drawn(doctor: Doctor, toy_set: Path, tmp_path: Path) -> None:
    code, text, _ = doctor("--data.data", str(toy_set), "--draw", "pictures", "--draw_samples", "2")
    assert code == 0, text
    assert "8 pictures in pictures; to turn and zoom: pictures/index.html" in text
    scenes = scenes_of(tmp_path / "pictures" / "index.html")
    assert [scene["title"].split()[:2] for scene in scenes] == [
        ["train", "0"], ["train", "1"], ["val", "0"], ["val", "1"],
    ]  # fmt: skip
    pictures = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert len(pictures) == 8 and pictures[1].startswith("train_0_") and pictures[1].endswith("_views.png")
    for name in pictures:
        assert np.asarray(Image.open(tmp_path / "pictures" / name)).std() > 10, f"{name} is not blank"
    for scene in scenes:
        assert sum(layer["count"] for layer in scene["layers"]) > 1000
        assert all(layer["camera"] and layer["picture"] and layer["depth"] for layer in scene["layers"])
    assert not (tmp_path / "run").exists(), "nothing was started"


@pytest.mark.parametrize("family", RECIPES)
def test_every_family_reads_own_scenes_by_one_option(doctor: Doctor, tmp_path: Path, family: str) -> None:
    write_transforms(tmp_path / "scenes" / "desk", shots(12))
    assert main(["prepare", "scenes", "--src", "scenes", "--out", "data/scenes", "--val-every", "2"]) == 0
    few = ["--data.epoch_length", "40"] if family == "diffusionsfm" else []  # one scene, and batches of two
    code, text, _ = doctor("+option=own_scenes", *few, "--draw=pictures", "--draw_samples=1", family=family)
    assert code == 0, text
    scenes = scenes_of(tmp_path / "pictures" / "index.html")
    assert [scene["title"] for scene in scenes] == ["train 0 own/desk", "val 0 own/desk"]
    val_frames = {int(layer["name"].rpartition(" ")[2]) for layer in scenes[1]["layers"]}
    assert val_frames <= {0, 2, 4, 6, 8, 10}


def test_photos_without_cameras_are_refused_for_training_in_one_message(doctor: Doctor, tmp_path: Path) -> None:
    write_photos(tmp_path / "trip", shots())
    assert main(["prepare", "scenes", "--src", "trip", "--out", "data/scenes"]) == 0
    code, text, errors = doctor("+option=own_scenes", "--draw", "pictures")
    assert code == 2
    told = "scene 'trip' was packed from photos without cameras, which serve prediction only"
    assert f"PROBLEM  data: data filter: {told}" in text and errors.startswith("error: --draw: ") and told in errors
    assert not (tmp_path / "pictures").exists()


def test_only_multi_view_data_is_drawn(tmp_path: Path) -> None:
    digits = str(tmp_path / "digits")
    assert main(["prepare", "digits", "--out", digits]) == 0
    config = {
        "class_path": "datamodules.ImageNetDataModule",
        "init_args": {"data": digits, "num_classes": 10, "image_size": 32, "batch_size_per_device": 2},
    }
    with pytest.raises(UserError, match="ImageNetDataModule gives ImageBatch; only multi-view data .* is drawn"):
        draw(config, DrawOptions(tmp_path / "pictures"))


def test_options_are_taken_out_of_the_line() -> None:
    options, rest = take_options(["--config", "a.yaml", "--draw", "out", "+smoke=vggt", "--draw_samples=3"])
    assert options == DrawOptions(Path("out"), 3) and rest == ["--config", "a.yaml", "+smoke=vggt"]
    assert take_options(["--config", "a.yaml"]) == (None, ["--config", "a.yaml"])
    for argv, expected in [
        (["--draw"], "--draw needs a value, as in --draw pictures"),
        (["--draw", "--draw_samples", "2"], "--draw needs a value"),
        (
            ["--draw", "out", "--draw_samples", "none"],
            "--draw_samples: expected a whole number of 1 or more, got 'none'",
        ),
        (["--draw", "out", "--draw_samples", "0"], "of 1 or more, got '0'"),
        (["--draw_samples", "2"], "--draw_samples needs --draw DIR"),
    ]:
        with pytest.raises(UserError, match=expected):
            take_options(argv)


def test_a_value_that_the_data_refuses_is_one_line(tmp_path: Path) -> None:
    sizes = {"views": 2, "size": [8, 8], "scenes": 1}
    config = {
        "class_path": "datamodules.CO3DDataModule",
        "init_args": {
            "data": "nowhere", "filter": {}, "val_filter": {}, "val_shape": sizes, "std": [1, 1, 0],
            "sampler": {"class_path": "restrike.data.views.RandomViews"},
            "shape": {"class_path": "restrike.data.multiview_plan.FixedShape", "init_args": sizes},
            "transform": {"class_path": "restrike.data.multiview_transforms.VGGTViews"},
            "val_transform": {"class_path": "restrike.data.multiview_transforms.VGGTViews"},
        },
    }  # fmt: skip
    with pytest.raises(UserError, match="--draw: .*data.mean, data.std: three numbers each, std above 0") as caught:
        draw(config, DrawOptions(tmp_path / "pictures"))
    assert "\n" not in str(caught.value) and "Union subtypes" not in str(caught.value)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("mine")
    with pytest.raises(UserError, match="--draw: .*pictures is a file; name a folder"):
        draw({"class_path": "datamodules.CO3DDataModule"}, DrawOptions(tmp_path / "pictures"))


def test_a_row_of_a_batch_keeps_its_own_views_and_drops_depth_that_is_not_valid() -> None:
    def count(*shape: int) -> torch.Tensor:
        return torch.arange(float(np.prod(shape))).view(shape)

    batch = MultiViewBatch(
        images=count(2, 3, 3, 4, 4) / 288, depth=count(2, 3, 2, 2) - 13, valid_depth=count(2, 3, 2, 2) % 2 == 0,
        foreground=torch.ones(2, 3, 2, 2, dtype=torch.bool), intrinsics=count(2, 3, 3, 3),
        world_to_camera=count(2, 3, 3, 4), crop_boxes=count(2, 3, 4), source_sizes=torch.ones(2, 3, 2).long(),
        frame_numbers=torch.tensor([[1, 2, 3], [4, 5, 6]]), is_video=torch.zeros(2, 3, dtype=torch.bool),
        valid=torch.ones(2, dtype=torch.bool), keys=["a", "b"], seed=0,
    )  # fmt: skip
    scene = scene_views(batch, 1, "title")
    assert scene.labels == ["view 0, frame 4", "view 1, frame 5", "view 2, frame 6"]
    assert scene.images.dtype == torch.uint8 and int(scene.images[0, 0, 0, 0]) == round(255 * 144 / 288)
    assert scene.depth.flatten().tolist() == [0, 0, 1, 0, 3, 0, 5, 0, 7, 0, 9, 0]
