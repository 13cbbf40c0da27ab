"""Saving: whatever stops it, a whole checkpoint is there, and it is the newest that was finished."""

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.checkpoint_io import AtomicCheckpointIO
from faults.cases import case
from restrike.checkpoints import atomic
from resume.harness import Run, train
from resume.processes import run

OLD, NEW = {"step": torch.tensor(1)}, {"step": torch.tensor(2), "weights": torch.zeros(1000)}


def save_and_die(path: Path, step: str) -> None:
    def failpoint(name: str) -> None:
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    atomic.failpoint = failpoint
    atomic.save(NEW, path)


@case("save", "killed: {step}", promise="the newest whole file is found and loads; the next save clears the rest")
@pytest.mark.parametrize("step", atomic.FAILPOINTS)
def test_killed_at_every_step_of_a_save(step: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    atomic.save(OLD, path)
    assert run(save_and_die, path, step, log=tmp_path / "log.txt") == [-signal.SIGKILL]
    found = atomic.newest_valid(tmp_path)
    assert found is not None
    expected = 2 if step in ("renamed", "done") else 1
    assert torch.load(found, weights_only=True)["step"] == expected
    atomic.save(NEW, path)
    assert sorted(file.name for file in tmp_path.glob("*.ckpt*")) == ["last-previous.ckpt", "last.ckpt"]


def save_over_the_limit(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        atomic.save({"weights": torch.zeros(1_000_000)}, path)
    except OSError as error:
        raise SystemExit(error.errno) from error


@case("save", "the file cannot grow (disk or quota full)", promise="OSError; the old file stays, no half file is left")
def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    atomic.save(OLD, path)
    assert run(save_over_the_limit, path, log=tmp_path / "log.txt") == [errno.EFBIG]
    assert [file.name for file in tmp_path.glob("*.ckpt*")] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == OLD


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def failpoint(name: str) -> None:
        if name == "writing":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "failpoint", failpoint)


@case("save", "disk full for one save", promise="a warning; training goes on, old files stay, nothing is removed")
def test_disk_full_for_one_save(full_disk: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, old, new = AtomicCheckpointIO(), tmp_path / "best-1.ckpt", tmp_path / "best-2.ckpt"
    old.write_bytes(b"old")
    with pytest.warns(UserWarning, match=r"best-2\.ckpt failed .*No space left.* 1 more"):
        io.save_checkpoint(NEW, new)
    with pytest.warns(UserWarning, match=r"keeping .*best-1"):
        io.remove_checkpoint(old)
    assert old.exists()
    monkeypatch.setattr(atomic, "failpoint", lambda name: None)
    io.save_checkpoint(NEW, new)
    io.remove_checkpoint(old)
    assert [file.name for file in tmp_path.iterdir()] == ["best-2.ckpt"]


@case("save", "disk full for three saves", promise="the run ends with the error and the file's name")
def test_disk_full_for_good(full_disk: None, tmp_path: Path) -> None:
    io = AtomicCheckpointIO(max_failures=2)
    for _ in range(2):
        with pytest.warns(UserWarning, match="training goes on"):
            io.save_checkpoint(NEW, tmp_path / "last.ckpt")
    with pytest.raises(OSError, match=r"last\.ckpt failed 3 times in a row.*No space left"):
        io.save_checkpoint(NEW, tmp_path / "last.ckpt")


@case("save", "the checkpoint folder vanishes", promise="it is made again")
def test_the_folder_vanishes(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(OLD, tmp_path / "gone" / "deep" / "last.ckpt")
    assert torch.load(tmp_path / "gone" / "deep" / "last.ckpt", weights_only=True) == OLD


@case("save", "a file stands where the folder should be", promise="OSError that names it")
def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="checkpoints"):
        atomic.save(OLD, tmp_path / "checkpoints" / "last.ckpt")


@case("save", "the file system has no hard links", promise="the previous file is kept all the same")
def test_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "last.ckpt"
    atomic.save(OLD, path)
    atomic.save(NEW, path)
    assert torch.load(path, weights_only=True)["step"] == 2
    assert torch.load(atomic.previous_path(path), weights_only=True) == OLD


@case("save", "what is saved cannot be pickled", promise="the error passes; the old file stays, no half file is left")
def test_an_object_that_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    atomic.save(OLD, path)
    with pytest.raises((AttributeError, TypeError), match="pickle|local"):
        atomic.save({"bad": lambda: None}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == OLD


@case("save", "another process is saving in the same folder", promise="its half-written file is left alone")
def test_a_running_process_keeps_its_temporary_file(tmp_path: Path) -> None:
    theirs = tmp_path / f"last.ckpt.tmp-{os.getppid()}"
    dead = tmp_path / "last.ckpt.tmp-999999999"
    for file in (theirs, dead):
        file.write_bytes(b"half")
    atomic.save(NEW, tmp_path / "last.ckpt")
    assert theirs.exists()
    assert not dead.exists()


def save_large(path: Path) -> None:
    content = {"weights": torch.ones(16_000_000)}
    atomic.save({"weights": torch.ones(10)}, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    atomic.save(content, path)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    raise SystemExit(min(grown_mib, 255))


@case("save", "memory is just enough for the model", promise="a save takes under a quarter of the file more (streamed)")
def test_a_save_makes_no_copy_in_memory(tmp_path: Path) -> None:
    (grown_mib,) = run(save_large, tmp_path / "last.ckpt", log=tmp_path / "log.txt")
    assert grown_mib < 16, "of 61 MiB"


class Worse(Callback):
    """Logs a metric that rises with every epoch."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.log("val/worse", float(trainer.current_epoch))


@case("save", "a metric does not improve", promise="last.ckpt is renewed all the same, best stays")
def test_last_is_renewed_without_a_new_best(tmp_path: Path) -> None:
    worse = Run(tmp_path, epochs=3, monitor="val/worse", more=((Worse, {}),), every_n_train_steps=None)
    assert run(train, worse, log=tmp_path / "log.txt") == [0]
    folder = tmp_path / "checkpoints"
    assert [file.name for file in folder.glob("best*")] == ["best-epoch0000-step00000010.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 30
