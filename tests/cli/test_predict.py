"""`predict` with a classifier: tables and a picture of a folder of images, and what it says of bad input."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from callbacks.write_predictions import _write_json
from cli.__main__ import main
from cli.errors import explain_weights
from restrike.checkpoints import save_released
from restrike.data.index import IMAGE_EXTENSIONS

ROOT = Path(__file__).resolve().parents[2]
JPEGS = ROOT / "tests" / "data" / "jpegs"
GOOD = ("chelsea_451x300_q92_422.jpg", "coffee_500x333_q90_420.jpg", "astronaut_256x192_exif_orientation6.jpg")
pytestmark = pytest.mark.filterwarnings("ignore")


def predict(tmp_path: Path, images: Path, *more: str) -> int:
    line = ["predict", "--config", str(ROOT / "conf" / "predict.yaml"), "model=fastervit_tiny"]
    small = ["--data.num_classes", "16", "--data.image_size", "64", "--data.num_workers", "0"]
    return main([*line, *small, "--data.images", str(images), "--run_dir", str(tmp_path / "run"), *more])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in GOOD:
        shutil.copy(JPEGS / name, folder)
    return folder


def tables(tmp_path: Path) -> tuple[list[dict[str, str]], list[dict]]:
    with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((tmp_path / "run" / "predictions.json").read_text())


def test_a_folder_gives_two_equal_tables_and_a_picture(tmp_path, photos):
    assert predict(tmp_path, photos) == 0
    rows, entries = tables(tmp_path)
    assert [entry["key"] for entry in entries] == sorted(GOOD)
    nested = [(e["key"], c["class"], c["probability"]) for e in entries for c in e["classes"]]
    assert nested == [(row["key"], int(row["class"]), float(row["probability"])) for row in rows]
    for entry in entries:
        values = [c["probability"] for c in entry["classes"]]
        assert len(values) == 5 and values == sorted(values, reverse=True) and sum(values) < 1
    with Image.open(tmp_path / "run" / "predictions.png") as sheet:
        assert sheet.width > 2 * 128


def test_one_photo_is_a_set_too(tmp_path, photos):
    assert predict(tmp_path, photos / GOOD[0]) == 0
    assert [entry["key"] for entry in tables(tmp_path)[1]] == [GOOD[0]]


def test_an_unreadable_photo_among_good_ones_is_logged_and_left_out(tmp_path, photos, caplog):
    shutil.copy(JPEGS / "corrupt_empty.jpg", photos)
    (photos / "aaa_notes.png").write_text("no picture")
    assert predict(tmp_path, photos) == 0
    assert [entry["key"] for entry in tables(tmp_path)[1]] == sorted(GOOD)
    assert "corrupt_empty.jpg" in caplog.text and "aaa_notes.png" in caplog.text


def refused(capsys, code: int) -> str:
    assert code == 2
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
    return error


def test_photos_of_which_none_can_be_read_are_an_error(tmp_path, capsys):
    folder = tmp_path / "broken"
    folder.mkdir()
    shutil.copy(JPEGS / "corrupt_empty.jpg", folder)
    assert "none of the images could be read" in refused(capsys, predict(tmp_path, folder))


def test_an_empty_or_missing_folder_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert f"no image ({', '.join(IMAGE_EXTENSIONS)})" in refused(capsys, predict(tmp_path, tmp_path / "empty"))
    assert "no such file or folder" in refused(capsys, predict(tmp_path, tmp_path / "nowhere"))


def test_a_place_that_cannot_be_written_is_named(tmp_path, photos, capsys):
    (tmp_path / "file").write_text("")
    code = predict(tmp_path, photos, "--run_dir", str(tmp_path / "file" / "run"))
    assert "file is a file, so nothing can be written there" in refused(capsys, code)


def test_weights_of_another_family_are_named(tmp_path, photos, capsys):
    from tiny_vggt import tiny_vggt

    save_released(tmp_path / "vggt.pth.tar", tiny_vggt())
    code = predict(tmp_path, photos, "--model.pretrained", str(tmp_path / "vggt.pth.tar"))
    assert "vggt.pth.tar does not fit the model" in refused(capsys, code)


def test_a_run_of_another_model_is_named(tmp_path, photos, capsys):
    from training_tools import ToyData, toy_module, toy_trainer

    trainer = toy_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(toy_module(), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "toy.ckpt")
    error = refused(capsys, predict(tmp_path, photos, "--ckpt_path", str(tmp_path / "toy.ckpt")))
    assert "--ckpt_path is of another model than the config's: it lacks" in error and len(error) < 400


def test_only_messages_about_weights_are_rewritten():
    assert explain_weights("CUDA out of memory") is None
    text = "Error(s) in loading state_dict for X:\n\tsize mismatch for net.fc.weight: copying a param with shape …"
    assert "'net.fc.weight' has another shape" in str(explain_weights(text))


def test_a_table_without_images_is_an_empty_list(tmp_path):
    table = tmp_path / "predictions.csv"
    table.write_text("key,rank,class,class_name,probability\n")
    _write_json(table)
    assert json.loads(table.with_suffix(".json").read_text()) == []
