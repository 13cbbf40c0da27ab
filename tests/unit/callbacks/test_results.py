"""What a run leaves in its folder: published weights, pictures, curves, a report, throughput."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from callbacks import EMA, Curves, LogPredictions, PublishWeights, Report, Throughput
from callbacks.log_predictions import to_uint8
from callbacks.report import result_table
from training_tools import ToyData, differing, make_batch, toy_module, toy_trainer, weights


def test_report_compares_raw_ema_and_majority_class(tmp_path, capsys):
    module = toy_module()
    trainer = toy_trainer(tmp_path, callbacks=[Report(), EMA(0.5)], max_epochs=1)
    trainer.fit(module, datamodule=ToyData())
    trainer.test(module, datamodule=ToyData(), verbose=False)
    record = json.loads((tmp_path / "report.json").read_text())
    for name in ("top1", "top1_ema", "top5", "loss"):
        assert record[f"test/{name}"] == float(trainer.callback_metrics[f"test/{name}"])
    assert record["test/top1_majority_class"] == pytest.approx(4 / 7) and record["images"] == 7
    table = (tmp_path / "report.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()] == [
        "weights", "--------------", "raw", "EMA", "majority class"
    ]  # fmt: skip


def test_a_table_shows_what_was_tested():
    lines = result_table({"test/top1": 0.5, "test/top5": 0.75, "test/loss": 1.23456}).splitlines()
    assert len(lines) == 3 and [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "raw",
        "50.00 %",
        "75.00 %",
        "1.2346",
    ]


def test_predictions_are_drawn_for_validation_and_test(tmp_path):
    module = toy_module()
    trainer = toy_trainer(tmp_path, callbacks=[LogPredictions(num_images=4, every_n_epochs=2, tile=32)], max_epochs=3)
    trainer.fit(module, datamodule=ToyData())
    trainer.test(module, datamodule=ToyData(), verbose=False)
    names = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert names == ["test.png", "val_step_0000004.png", "val_step_0000012.png"]
    with Image.open(tmp_path / "predictions" / "test.png") as sheet:
        assert sheet.width == 2 * (32 + 6 + 6) + 6


@pytest.mark.parametrize("num_images, num_batches, batch_size", [(4, 2, 4), (5, 2, 4), (3, 9, 4), (100, 2, 4)])
def test_images_are_spread_over_the_split_and_padding_is_never_drawn(tmp_path, num_images, num_batches, batch_size):
    class FakeTrainer:
        is_global_zero, datamodule = True, ToyData()

    callback = LogPredictions(num_images)
    for index in range(num_batches):
        batch = make_batch(index, batch_size, num_padding=1)
        callback._collect(FakeTrainer(), {"logits": torch.randn(batch_size, 4)}, batch, index, num_batches)
    keys = [p.key for p in callback._predictions]
    assert len(set(keys)) == len(keys) == min(num_images, num_batches * (batch_size - 1))
    assert not any(key.endswith(f"-{batch_size - 1}") for key in keys)
    assert len({key.split("-")[0] for key in keys}) == min(num_images, num_batches)


def test_drawn_images_have_their_colours_back():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (ToyData.mean, ToyData.std))
    assert torch.equal(to_uint8((pixels / 255 - mean) / std, ToyData()), pixels)


def test_curves_are_drawn_from_the_csv_logger(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = [Curves(), LearningRateMonitor("step")]
    trainer = toy_trainer(tmp_path, callbacks=callbacks, logger=logger, max_epochs=1)
    trainer.fit(toy_module(), datamodule=ToyData())
    with Image.open(tmp_path / "curves.png") as picture:
        assert np.asarray(picture).std() > 1


def test_curves_of_a_run_that_fails_are_drawn_too(tmp_path):
    trainer = toy_trainer(tmp_path, callbacks=[Curves()], logger=CSVLogger(tmp_path, name="", version=""))
    with pytest.raises(ValueError, match="add callbacks.ema"):  # in the first validation
        trainer.fit(toy_module(evaluate="ema"), datamodule=ToyData())
    assert (tmp_path / "curves.png").is_file()


def test_throughput_reaches_the_loggers_at_their_interval(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = toy_trainer(tmp_path, callbacks=[Throughput()], logger=logger, max_epochs=2, log_every_n_steps=4)
    trainer.fit(toy_module(), datamodule=ToyData())
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["throughput/step_s"]]
    assert [int(row["step"]) for row in rows] == [3, 7]
    for row in rows:
        per_step, rate = float(row["throughput/step_s"]), float(row["throughput/images_per_s"])
        assert rate * per_step == pytest.approx(4.0) and 0 < float(row["throughput/data_fraction"]) < 1


class Score:
    """Stands for a trainer whose validation gave `value`."""

    sanity_checking, is_global_zero, fast_dev_run, current_epoch = False, True, False, 3

    def __init__(self, root, **metrics: float) -> None:
        self.default_root_dir, self.callback_metrics = root, metrics
        self.state = type("State", (), {"fn": "fit"})


def publish_writes(monkeypatch, callback, trainers) -> list[bool]:
    written = []
    monkeypatch.setattr(callback, "_write", lambda trainer, module, metric: written.append(trainer))
    for trainer in trainers:
        callback.on_validation_end(trainer, None)
    return [trainer in written for trainer in trainers]


def test_weights_are_published_at_each_new_best_by_the_average(monkeypatch, tmp_path):
    scores = [(0.1, 0.9), (0.2, 0.8), (0.15, 0.99), (0.3, 0.7), (0.3, 0.99)]
    trainers = [Score(tmp_path, **{"val/top1_ema": ema, "val/top1": raw}) for ema, raw in scores]
    assert publish_writes(monkeypatch, PublishWeights(), trainers) == [True, True, False, True, False]
    trainers = [Score(tmp_path, **{"val/loss": value}) for value in (2.0, 1.0, 1.5)]
    assert publish_writes(monkeypatch, PublishWeights("val/loss", "min"), trainers) == [True, True, False]


def test_a_metric_that_nobody_logs_is_named(tmp_path):
    with pytest.raises(ValueError, match="'val/top2' is not logged; there is val/top1"):
        PublishWeights("val/top2").on_validation_end(Score(tmp_path, **{"val/top1": 1.0}), None)


def test_published_weights_are_those_of_the_run(tmp_path):
    from restrike.checkpoints import load_released

    ema, module = EMA(0.5), toy_module()
    trainer = toy_trainer(tmp_path, callbacks=[PublishWeights(), ema], max_epochs=1, limit_val_batches=0)
    trainer.fit(module, datamodule=ToyData())
    path = tmp_path / "weights" / "test_resnet.pth.tar"
    for use_ema, expected in ((False, module.net), (True, ema.shadow())):
        fresh = toy_module().net
        load_released(fresh, path, use_ema=use_ema)
        assert not differing(weights(fresh), weights(expected))


def test_a_published_file_starts_another_run_with_other_classes(tmp_path):
    from restrike.checkpoints import save_released

    source, path = toy_module(), tmp_path / "weights.pth.tar"
    torch.nn.init.normal_(source.net.conv1[0].weight)
    save_released(path, source.net)
    module = toy_module(num_classes=7, pretrained=str(path), pretrained_strict=False)
    assert torch.equal(module.net.conv1[0].weight, source.net.conv1[0].weight)
    assert module.net.fc.out_features == 7
    with pytest.raises(ValueError, match="fc"):
        toy_module(num_classes=7, pretrained=str(path))
