"""Which files `Checkpoint` leaves, and what its state says."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from callbacks.checkpoint import Checkpoint
from callbacks.checkpoint_io import AtomicCheckpointIO
from restrike.checkpoints import atomic
from resume.harness import ToyData, ToyModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on loaders


class Scores(Callback):
    """Logs given values of `val/top1`, one a validation."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.log("val/top1", self.values.pop(0))


def fit(root: Path, checkpoint: Checkpoint, *scores: float, ckpt_path: Path | None = None, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"max_epochs": len(scores), "limit_train_batches": 4, "limit_val_batches": 1}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Scores(*scores), checkpoint],
        plugins=[AtomicCheckpointIO(keep_previous=False)],
        **(settings | arguments),
    )
    trainer.fit(ToyModule(), datamodule=ToyData(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def files(root: Path) -> list[str]:
    return sorted(file.name for file in (root / "checkpoints").iterdir())


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_last_is_the_newest_and_best_the_best(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoint(monitor="val/top1"), 0.2, 0.6, 0.4)
    assert files(tmp_path) == ["best-epoch0001-step00000008.ckpt", "last.ckpt"]
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 12


def test_a_file_that_is_best_and_last_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setattr(atomic, "failpoint", lambda name: saved.append(name) if name == "opened" else None)
    fit(tmp_path, Checkpoint(monitor="val/top1"), 0.2, 0.6)
    assert len(saved) == 2
    best, last = (tmp_path / "checkpoints" / name for name in files(tmp_path))
    assert best.stat().st_ino == last.stat().st_ino


def test_save_top_k_keeps_so_many(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoint(monitor="val/top1", save_top_k=2), 0.2, 0.6, 0.4, 0.1)
    assert [name for name in files(tmp_path) if "best" in name] == [
        "best-epoch0001-step00000008.ckpt",
        "best-epoch0002-step00000012.ckpt",
    ]


def test_without_a_monitor_only_last_is_kept(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoint(), 0.2, 0.6)
    assert files(tmp_path) == ["last.ckpt"]


def test_a_monitored_metric_that_nobody_logs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="'val/top5'"):
        fit(tmp_path, Checkpoint(monitor="val/top5"), 0.2)


def test_steps_are_saved_when_they_are_done_and_not_within_a_window(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    class Note(Checkpoint):
        def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            steps.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_idx))

    fit(tmp_path, Note(every_n_train_steps=2), 0.1, limit_train_batches=9, accumulate_grad_batches=2)
    assert steps == [(2, 3), (4, 7), (5, 8)]


def test_every_n_epochs_and_the_end_of_the_run(tmp_path: Path) -> None:
    steps: list[int] = []

    class Note(Checkpoint):
        def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            steps.append(trainer.global_step)

    fit(tmp_path, Note(every_n_epochs=2), 0.1, 0.1, 0.1)
    assert steps == [8, 12]


def test_a_metric_is_judged_once_a_validation(tmp_path: Path) -> None:
    """Validation every second epoch: the epochs between must not enter the stale value again."""
    fit(tmp_path, Checkpoint(monitor="val/top1", save_top_k=3), 0.1, 0.2, max_epochs=4, check_val_every_n_epoch=2)
    assert [name for name in files(tmp_path) if "best" in name] == [
        "best-epoch0001-step00000008.ckpt",
        "best-epoch0003-step00000016.ckpt",
    ]


def test_a_moved_run_folder_goes_on_in_its_new_place(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    fit(old, Checkpoint(monitor="val/top1"), 0.2, 0.6)
    os.rename(old, new)
    checkpoint = Checkpoint(monitor="val/top1")
    fit(new, checkpoint, 0.7, max_epochs=3, ckpt_path=new / "checkpoints" / "last.ckpt")
    assert files(new) == ["best-epoch0002-step00000012.ckpt", "last.ckpt"], "the old best was known, beaten, removed"
    assert checkpoint.best_model_path == str(new / "checkpoints" / "best-epoch0002-step00000012.ckpt")
    assert not old.exists()


def test_a_worse_metric_after_a_resume_is_no_best(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoint(monitor="val/top1"), 0.2, 0.6)
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit(tmp_path, Checkpoint(monitor="val/top1"), 0.5, max_epochs=3, ckpt_path=last)
    assert files(tmp_path) == ["best-epoch0001-step00000008.ckpt", "last.ckpt"]


def test_the_old_best_goes_only_when_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "checkpoints", []

    def look(name: str) -> None:
        if name == "done":
            seen.append(sorted(file.name for file in folder.glob("best*")))

    monkeypatch.setattr(atomic, "failpoint", look)
    fit(tmp_path, Checkpoint(monitor="val/top1"), 0.2, 0.6)
    old, new = "best-epoch0000-step00000004.ckpt", "best-epoch0001-step00000008.ckpt"
    assert [old] in seen
    assert [old, new] in seen
    assert files(tmp_path) == [new, "last.ckpt"]


def test_nothing_is_saved_by_a_dry_run(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoint(monitor="val/top1"), 0.2, fast_dev_run=True)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("arguments", [{"filename": "epoch{epoch}"}, {"every_n_train_steps": 0}])
def test_impossible_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.checkpoint"):
        Checkpoint(**arguments)


def test_checkpoints_go_to_remote_file_systems_and_back() -> None:
    io, path = AtomicCheckpointIO(), "memory://run/checkpoints/last.ckpt"
    io.save_checkpoint({"weights": torch.arange(3)}, path)
    assert torch.equal(io.load_checkpoint(path)["weights"], torch.arange(3))
    io.remove_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint(path)
