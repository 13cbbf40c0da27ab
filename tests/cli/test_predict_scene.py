"""`predict` with the multi-view recipes: a folder of photos becomes a scene, and what it says of bad input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from cli.__main__ import main
from cli.compose import compose_all
from cli.photos import PHOTO_DATA, for_photos
from own_scene_layouts import shots
from recipes import FAMILIES, MULTIVIEW, composed, path
from restrike.data_prep.colmap import read_model
from restrike.data_prep.own_frames import read_pixels
from restrike.data_prep.own_scenes import ReadOptions, read_scene
from restrike.geometry import focal_from_points
from restrike.models import build

JPEGS = Path(__file__).resolve().parents[1] / "data" / "jpegs"
pytestmark = pytest.mark.filterwarnings("ignore")
FILES = {"index.html", "points.ply", "scene.glb", "transforms.json", "cameras.npz", "sparse", "images", "views"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Random, but good enough to run: each family's smallest recipe."""
    folder, files = tmp_path_factory.mktemp("weights"), {}
    for family in FAMILIES:
        model = composed(f"smoke_{family}")["model"]["init_args"]
        torch.manual_seed(1)
        files[family] = folder / f"{family}.pth"
        state = build(model["model_name"], **model["model_args"]).state_dict()
        if family == "vggt":
            state["camera_head.pose_branch.fc2.weight"][7:] = 0  # random fields of view may be zero
            state["camera_head.pose_branch.fc2.bias"][7:] = 0.25  # radians, added in each of 4 rounds
        torch.save(state, files[family])
    return files


@pytest.fixture(autouse=True)
def random_weights_have_a_focal_length(monkeypatch):
    """CUT3R's comes from points, and those of random weights fit no camera."""
    module = "lightning_modules.recurrent_reconstruction"
    monkeypatch.setattr(f"{module}.focal_from_points", lambda p, *_, **__: focal_from_points(p, *_, **__).abs() + 9)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, shot in enumerate(shots(3)):
        Image.fromarray(shot.image).save(folder / f"view {number}.png")
    return folder


def predict(family: str, photos: Path, out: Path, *more: str) -> int:
    line = ["predict", "--config", path(f"smoke_{family}"), "trainer.accelerator=cpu"]
    quick = ["--model.num_steps", "10"] if family == "diffusionsfm" else []
    end = ["--data.images", str(photos), "--data.out", str(out), "--run_dir", str(out.parent / "run"), *quick]
    return main([*line, *end, *more])


def refused(capsys, code: int) -> str:
    assert code == 2
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
    return error


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_photos_becomes_a_scene(family, weights, photos, tmp_path):
    turned = JPEGS / "astronaut_256x192_exif_orientation6.jpg"
    shutil.copy(turned, photos / "IMG_3.jpg")  # another size, and lying on its side
    out = tmp_path / "new" / "scene"
    assert predict(family, photos, out, "--model.pretrained", str(weights[family])) == 0
    assert {file.name for file in out.iterdir()} == FILES
    with np.load(out / "cameras.npz") as found:
        names, sizes, poses = found["names"].tolist(), found["sizes"].tolist(), found["world_to_camera"]
        assert found["sources"].tolist() == ["IMG_3.jpg", *(f"view {number}.png" for number in range(3))]
    assert names == ["IMG_3.jpg", "view_0.png", "view_1.png", "view_2.png"]
    with Image.open(turned) as stored:
        assert sizes == [list(stored.size), [72, 96], [72, 96], [72, 96]]  # (H, W), upright
    np.testing.assert_allclose(poses[0], np.eye(4)[:3], atol=1e-5)  # the first camera is the world
    for name in names:
        with np.load(out / "views" / f"{name}.npz") as view:
            assert view["depth"].ndim == 2 and ("confidence" in view) == (family != "diffusionsfm")
    model = read_model(out / "sparse" / "0")
    assert [image.name for image in model.images] == names
    # The scene is one of one's own, with cameras that fit its pictures.
    scene = read_scene(out, ReadOptions(layout="transforms"))
    assert scene.has_cameras
    for frame, size in zip(scene.frames, sizes, strict=True):
        assert list(read_pixels(scene, frame).image.shape[:2]) == size
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_photos_that_a_stream_sees_one_by_one_give_what_the_whole_sequence_gives(weights, photos, tmp_path):
    from lightning_modules import RecurrentReconstructionModule
    from restrike.data.photo_views import CUT3RPhotos, stack_views
    from restrike.data.photos import list_photos, open_photo
    from restrike.geometry import to_first_camera

    assert predict("cut3r", photos, tmp_path / "scene", "--model.pretrained", str(weights["cut3r"])) == 0
    model = composed("smoke_cut3r")["model"]["init_args"]
    module = RecurrentReconstructionModule(
        model["model_name"], model["model_args"], pretrained=str(weights["cut3r"]), evaluate="raw"
    ).eval()
    transform = CUT3RPhotos(48, is_square=True, patch_size=8)
    images, boxes, sizes = stack_views([transform(open_photo(photos / name)) for name in list_photos(photos)])
    batch = SimpleNamespace(images=images[None] / 127.5 - 1, crop_boxes=boxes[None], source_sizes=sizes[None], keys=[])
    with torch.no_grad():
        views = module.predict_step(batch, 0)["views"]
    with np.load(tmp_path / "scene" / "cameras.npz") as found:
        np.testing.assert_allclose(found["intrinsics"], views.intrinsics[0], rtol=1e-3)
        np.testing.assert_allclose(found["world_to_camera"], to_first_camera(views.world_to_camera)[0], atol=1e-4)


@pytest.mark.parametrize("family", ["vggt", "diffusionsfm"])
def test_more_photos_than_fit_go_in_windows_and_become_one_scene(family, weights, photos, tmp_path):
    for number, shot in enumerate(shots(5)):
        Image.fromarray(shot.image).save(photos / f"view {number}.png")
    few = ["--data.max_views", "3", "--data.overlap", "2"]
    assert predict(family, photos, tmp_path / "scene", "--model.pretrained", str(weights[family]), *few) == 0
    with np.load(tmp_path / "scene" / "cameras.npz") as found:
        assert len(found["names"]) == 5 and np.isfinite(found["world_to_camera"]).all()


def test_one_photo_is_a_scene_too(weights, photos, tmp_path):
    one = photos / "view 1.png"
    for family in FAMILIES:
        assert predict(family, one, tmp_path / family, "--model.pretrained", str(weights[family])) == 0
        frames = json.loads((tmp_path / family / "transforms.json").read_text())["frames"]
        assert [frame["file_path"] for frame in frames] == ["images/view_1.png"]


def test_of_very_many_photos_some_are_taken_evenly(weights, photos, tmp_path):
    for number in range(40):
        shutil.copy(photos / "view 0.png", photos / f"more{number}.png")
    bound = ["--data.max_photos", "4"]
    assert predict("cut3r", photos, tmp_path / "scene", "--model.pretrained", str(weights["cut3r"]), *bound) == 0
    with np.load(tmp_path / "scene" / "cameras.npz") as found:
        assert found["sources"].tolist() == ["more0.png", "more14.png", "more28.png", "view 2.png"]


def test_photos_without_overlap_still_give_a_scene_that_every_format_holds(weights, tmp_path):
    """Networks always answer; what cannot be a camera is listed, and all that is written is finite."""
    folder, random = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(3):
        pixels = random.integers(0, 256, (64 + 8 * number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for family in FAMILIES:
        out = tmp_path / family
        assert predict(family, folder, out, "--model.pretrained", str(weights[family])) == 0
        with np.load(out / "cameras.npz") as found:
            assert np.isfinite(found["world_to_camera"]).all() and np.isfinite(found["intrinsics"]).all()
            lost = (out / "skipped.txt").read_text().splitlines() if (out / "skipped.txt").exists() else []
            assert len(found["names"]) + len(lost) == 3


def test_an_unreadable_photo_among_good_ones_is_left_out_and_listed(weights, photos, tmp_path, caplog):
    shutil.copy(JPEGS / "corrupt_truncated_60pct.jpg", photos / "a.jpg")  # the first one of all
    (photos / "view 1b.png").write_text("no picture")
    for family in ("vggt", "cut3r"):
        out = tmp_path / family
        assert predict(family, photos, out, "--model.pretrained", str(weights[family])) == 0
        listed = dict(line.split("\t") for line in (out / "skipped.txt").read_text().splitlines())
        assert set(listed) == {"a.jpg", "view 1b.png"} and "Pillow can read" in listed["view 1b.png"]
        with np.load(out / "cameras.npz") as found:
            assert found["sources"].tolist() == ["view 0.png", "view 1.png", "view 2.png"]
    assert "left out a.jpg" in caplog.text


def test_photos_that_no_camera_was_found_for_are_listed(weights, photos, tmp_path, monkeypatch, capsys):
    from lightning_modules import recurrent_reconstruction as module

    real, focals = module.focal_from_points, iter([1.0, -1.0, 1.0])
    monkeypatch.setattr(module, "focal_from_points", lambda *a, **k: next(focals) * real(*a, **k))
    assert predict("cut3r", photos, tmp_path / "scene", "--model.pretrained", str(weights["cut3r"])) == 0
    assert (tmp_path / "scene" / "skipped.txt").read_text() == "view 1.png\tthe network found no camera\n"
    assert len(json.loads((tmp_path / "scene" / "transforms.json").read_text())["frames"]) == 2


def test_photos_of_which_none_can_be_read_leave_nothing_behind(weights, tmp_path, capsys):
    folder = tmp_path / "broken"
    folder.mkdir()
    shutil.copy(JPEGS / "corrupt_empty.jpg", folder)
    code = predict("vggt", folder, tmp_path / "out" / "scene", "--model.pretrained", str(weights["vggt"]))
    assert "none of the 1 photos" in (error := refused(capsys, code)) and "corrupt_empty.jpg: the file is" in error
    assert not list((tmp_path / "out").glob("*scene*"))


def test_mistakes_are_said_before_a_network_is_built(weights, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cli.main.CLI.instantiate_classes", lambda self: pytest.fail("too late"))
    trained = ["--model.pretrained", str(weights["vggt"])]
    (tmp_path / "empty").mkdir()
    assert "no photo (jpg" in refused(capsys, predict("vggt", tmp_path / "empty", tmp_path / "a", *trained))
    assert "no such file or folder" in refused(capsys, predict("vggt", tmp_path / "no", tmp_path / "a", *trained))
    assert "--data.out: " in refused(capsys, predict("vggt", photos, tmp_path / "empty", *trained))  # exists
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "scene"
    code = predict("vggt", photos, blocked, *trained, "--run_dir", str(tmp_path / "run"))
    assert "is no folder" in refused(capsys, code)
    assert "predict needs trained weights" in refused(capsys, predict("vggt", photos, tmp_path / "a"))
    code = main(["predict", "--config", path("smoke_vggt"), *trained, "--run_dir", str(tmp_path / "run")])
    assert "--data.images DIR (of photos) and --data.out DIR" in refused(capsys, code)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(weights, photos, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    code = predict("vggt", photos, tmp_path / "locked" / "a", "--model.pretrained", str(weights["vggt"]))
    assert "no permission" in refused(capsys, code)


def test_weights_of_another_family_are_named(weights, photos, tmp_path, capsys):
    code = predict("cut3r", photos, tmp_path / "a", "--model.pretrained", str(weights["vggt"]))
    assert "vggt.pth does not fit the model" in refused(capsys, code)


def test_a_runs_checkpoint_is_taken_and_the_files_it_started_from_are_not_read(weights, photos, tmp_path, capsys):
    from lightning_modules import MultiViewReconstructionModule

    model = composed("smoke_vggt")["model"]["init_args"]
    module = MultiViewReconstructionModule(
        model["model_name"], model["model_args"], pretrained=str(weights["vggt"]), evaluate="raw"
    )
    trainer = Trainer(accelerator="cpu", max_epochs=0, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    ckpt = ["--ckpt_path", str(tmp_path / "run.ckpt")]
    gone = "++model.init_args.patch_embed_pretrained=gone.pth"
    assert predict("vggt", photos, tmp_path / "a", "--model.pretrained", str(weights["vggt"])) == 0
    assert predict("vggt", photos, tmp_path / "b", *ckpt) == 0
    with np.load(tmp_path / "a" / "cameras.npz") as a, np.load(tmp_path / "b" / "cameras.npz") as b:
        np.testing.assert_array_equal(a["world_to_camera"], b["world_to_camera"])
    capsys.readouterr()
    assert "gone.pth" in refused(capsys, predict("vggt", photos, tmp_path / "c", *ckpt, gone))  # said by hand: read
    code = predict("cut3r", photos, tmp_path / "d", *ckpt)
    assert "is of another model than the config's" in refused(capsys, code)


@pytest.mark.parametrize("name", MULTIVIEW)
def test_every_recipe_gives_way_to_photos_at_its_own_size(name):
    config = compose_all([path(name)], ["trainer.devices=2"], lambda c: for_photos(c, True)).config
    assert config["data"]["class_path"] == PHOTO_DATA
    size = composed(name)["data"]["init_args"]["val_shape"]["size"]
    assert config["data"]["init_args"]["transform"]["init_args"]["size"] == max(size)
    assert set(config["callbacks"]) == {"write_scene", "progress"}
    assert config["trainer"]["devices"] == 2 and config["trainer"]["strategy"] == "auto"  # the line beats us
    model = config["model"]["init_args"]
    assert not any(model[key] for key in model if key.endswith("pretrained"))
    assert model["model_name"] == composed(name)["model"]["init_args"]["model_name"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_runs_saved_config_gives_way_at_the_same_size(family):
    config = composed(f"smoke_{family}")
    expected = for_photos(config, True)["data"]
    shape = config["data"]["init_args"]["val_shape"]
    saved = {"class_path": "restrike.data.multiview_plan.PooledShape", "init_args": shape}
    config["data"]["init_args"]["val_shape"] = saved
    assert for_photos(config, True)["data"] == expected


def test_a_classifiers_recipe_stays_as_it_is():
    config = composed("predict")
    assert for_photos(config, False) is config
