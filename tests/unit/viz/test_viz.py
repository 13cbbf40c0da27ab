"""Pictures hold what they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restrike.viz import Prediction, contact_sheet, join_metrics, plot_curves, read_metrics


def test_contact_sheet_frames_right_green_and_wrong_red():
    white = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    right = Prediction(white, "a/very/long/key/that/does/not/fit/into/one/line.png", "cat", "cat", 0.9)
    sheet = np.asarray(contact_sheet([right, right._replace(predicted="dog"), right], columns=2, tile=40))
    column, row = 40 + 2 * 3 + 6, 40 + 2 * 3 + 3 * 13 + 6
    green, red = sheet[7, 7].astype(int), sheet[7, 7 + column].astype(int)
    assert green[1] > green[0] + 50 and red[0] > red[1] + 50
    assert (sheet[10:40, 10:40] == 255).all(), "the picture itself"
    assert (sheet[6 + row :, 6 + column :] == 255).all(), "no fourth picture"


def test_contact_sheet_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one prediction"):
        contact_sheet([])


def test_curves_are_read_without_empty_cells_and_drawn(tmp_path: Path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("epoch,step,train/loss,val/top1,lr\n0,0,2.5,,0.1\n0,1,,0.5,\n1,2,1.5,,0.2\n")
    assert read_metrics(metrics) == {
        "train/loss": ([0.0, 2.0], [2.5, 1.5]),
        "val/top1": ([1.0], [0.5]),
        "lr": ([0.0, 2.0], [0.1, 0.2]),
    }
    with Image.open(plot_curves(metrics, tmp_path / "out" / "curves.png")) as picture:
        assert np.asarray(picture).std() > 1


def test_curves_of_an_empty_run_are_drawn_too(tmp_path: Path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("epoch,step\n")
    assert plot_curves(metrics, tmp_path / "curves.png").is_file()


def test_a_resumed_runs_log_takes_over_at_its_first_step(tmp_path: Path):
    before, after = tmp_path / "0.csv", tmp_path / "1.csv"
    before.write_text("step,train/loss,val/top1\n0,3.0,\n1,2.0,0.1\n2,9.0,\n")
    after.write_text("step,train/loss\n2,1.0\n3,0.5\n")
    assert join_metrics([before, after]) == {
        "train/loss": ([0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.5]),
        "val/top1": ([1.0], [0.1]),
    }
