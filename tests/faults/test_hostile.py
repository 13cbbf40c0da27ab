"""Checkpoints that try to run code: nothing of them runs, through no door."""

import argparse
import functools
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from callbacks.checkpoint_io import AtomicCheckpointIO
from faults.cases import case
from restrike.checkpoints import CheckpointError, load_released, safe_load


class Gadget:
    """Unpickling it calls a function of the attacker's choice."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def gadgets(mark: Path) -> dict[str, Any]:
    """Objects that would create `mark` when they are unpickled; it works, see the first test."""
    return {
        "os.system": Gadget(os.system, f"touch {mark}"),
        "subprocess": Gadget(subprocess.call, ["touch", str(mark)]),
        "eval": Gadget(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Gadget(exec, f"open({str(mark)!r}, 'w')"),
        "functools.partial": functools.partial(open, str(mark), "w"),
        "torch.load of another file": Gadget(torch.load, str(mark.with_name("inner.pt"))),
        "an nn.Module": nn.Linear(1, 1),
        "a numpy object array": np.array([Gadget(os.system, f"touch {mark}")], dtype=object),
    }


NAMES = list(gadgets(Path("mark")))
DOORS: dict[str, Callable[[Path], Any]] = {
    "--ckpt_path": lambda path: AtomicCheckpointIO().load_checkpoint(path),
    "--model.pretrained": lambda path: load_released(nn.Linear(1, 1), path),
    "safe_load": safe_load,
}


def test_the_gadgets_work_where_nobody_guards(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(gadgets(mark)["os.system"]))
    assert mark.exists()


@case("hostile checkpoint", "{gadget} through {door}", promise="refused by name; nothing runs")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("gadget", NAMES)
def test_a_gadget_runs_nothing(gadget: str, door: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "mark"
    torch.save({"state_dict": {"weight": torch.zeros(1, 1)}, "extra": gadgets(mark)[gadget]}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pth"):
        DOORS[door](path)
    assert not mark.exists()


@case("hostile checkpoint", "the old format, a bare pickle", promise="refused by name; nothing runs")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_bare_pickle_runs_nothing(writer: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "mark"
    content = {"state_dict": gadgets(mark)["os.system"]}
    if writer == "torch":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content))
    for door in DOORS.values():
        with pytest.raises(CheckpointError, match=r"weights\.pth"):
            door(path)
    assert not mark.exists()


@case("hostile checkpoint", "weights_only=False is asked for", promise="refused")
def test_the_protection_cannot_be_switched_off(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="would run code"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)


@case("hostile checkpoint", "a released file with argparse arguments", promise="loads; they become inert values")
def test_released_arguments_become_inert(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth.tar"
    arguments = argparse.Namespace(lr=0.1, model="m")
    torch.save({"state_dict": {"weight": torch.ones(1, 1), "bias": torch.ones(1)}, "args": arguments}, path)
    loaded = safe_load(path)["args"]
    assert not isinstance(loaded, argparse.Namespace)
    assert vars(loaded) == {"lr": 0.1, "model": "m"}
    net = nn.Linear(1, 1)
    load_released(net, path)
    assert net.weight.item() == 1


@case("hostile checkpoint", "a gadget within the arguments of a released file", promise="refused; nothing runs")
def test_a_gadget_within_arguments(tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.pth.tar", tmp_path / "mark"
    torch.save({"args": argparse.Namespace(lr=gadgets(mark)["os.system"])}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pth\.tar"):
        safe_load(path)
    assert not mark.exists()


@case("hostile checkpoint", "an archive with a path out of its folder", promise="nothing is written anywhere")
def test_a_record_that_climbs_out(tmp_path: Path) -> None:
    path = tmp_path / "in" / "weights.pth"
    path.parent.mkdir()
    torch.save({"weight": torch.zeros(1)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escaped", "x")
    before = sorted(tmp_path.rglob("*"))
    try:
        safe_load(path)
    except CheckpointError as error:
        assert "weights.pth" in str(error)
    assert sorted(tmp_path.rglob("*")) == before


@case("hostile checkpoint", "a safetensors header longer than its file", promise="refused by name")
def test_a_lying_safetensors_header(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        safe_load(path)
