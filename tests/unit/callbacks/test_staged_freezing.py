"""Stages of training by parameter name: what trains, in which mode, on how many ranks, and after a resume."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from callbacks.staged_freezing import StagedFreezing
from resume.harness import Run, ToyData, ToyModule, differences, end, train
from resume.processes import run

FIRST, NORM, LAST = "net.1.*", "net.2.*", "net.5.*"


class Watch(Callback):
    """Copies the weights at every epoch's end and notes the modes of the parts."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.training: list[dict[str, bool]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})
        self.training.append({name: part.training for name, part in pl_module.net.named_children()})


def fit(stages: dict[int, list[str]], tmp_path: Path, epochs: int = 3, **arguments: Any) -> tuple[Any, Watch]:
    torch.manual_seed(0)
    module, watch = ToyModule(), Watch()
    watch.weights.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[StagedFreezing(stages, **arguments), watch],
    )
    trainer.fit(module, datamodule=ToyData(0))
    return trainer, watch


def changed(watch: Watch, epoch: int) -> set[str]:
    """Entries of the state dict that moved in an epoch."""
    before, after = watch.weights[epoch], watch.weights[epoch + 1]
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_frozen_parameters_rest_until_their_stage(tmp_path: Path) -> None:
    trainer, watch = fit({0: [FIRST, NORM], 1: [FIRST], 2: []}, tmp_path)
    head = {"net.5.weight", "net.5.bias"}
    norm = {"net.2.weight", "net.2.bias", "net.2.running_mean", "net.2.running_var", "net.2.num_batches_tracked"}
    assert changed(watch, 0) == head
    assert changed(watch, 1) == head | norm
    assert changed(watch, 2) == head | norm | {"net.1.weight", "net.1.bias"}
    assert [modes["2"] for modes in watch.training] == [False, True, True]
    assert all(modes["4"] for modes in watch.training), "dropout outside a frozen part goes on"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_eval_frozen_false_leaves_the_statistics_moving(tmp_path: Path) -> None:
    _, watch = fit({0: [NORM]}, tmp_path, epochs=1, eval_frozen=False)
    assert "net.2.running_mean" in changed(watch, 0)
    assert "net.2.weight" not in changed(watch, 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_stages_by_step_begin_with_the_step(tmp_path: Path) -> None:
    steps = []

    class Note(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            steps.append(pl_module.net[1].weight.grad is not None)

    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=6,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[StagedFreezing({0: [FIRST], 2: [], 4: [FIRST]}, unit="step"), Note()],
    )
    trainer.fit(ToyModule(), datamodule=ToyData(0))
    assert steps == [False, False, True, True, False, False]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_optimizer_holds_all_that_ever_trains_and_keeps_its_state(tmp_path: Path) -> None:
    class Groups(ToyModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Groups()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[StagedFreezing({0: [FIRST], 1: [LAST]})],
    )
    trainer.fit(module, datamodule=ToyData(0))
    optimizer = trainer.optimizers[0]
    assert len(optimizer.param_groups[0]["params"]) == 6
    taken = {name: int(optimizer.state[p]["step"]) for name, p in module.named_parameters()}
    assert taken["net.1.weight"] == 10, "only in the second epoch"
    assert taken["net.5.weight"] == 10, "only in the first, and its state is still there"
    assert taken["net.2.weight"] == 20


def test_a_parameter_that_the_model_fixed_stays_fixed(tmp_path: Path) -> None:
    module = ToyModule()
    module.net[1].bias.requires_grad_(False)
    freezing = StagedFreezing({0: [LAST], 1: []})
    freezing.setup(Trainer(accelerator="cpu", devices=1, logger=False, barebones=True), module, "fit")
    assert not module.net[1].bias.requires_grad
    assert module.net[1].weight.requires_grad
    freezing.load_state_dict({"stage": 1})
    assert module.net[5].weight.requires_grad
    assert not module.net[1].bias.requires_grad


def cpu_trainer() -> Trainer:
    return Trainer(accelerator="cpu", devices=1, logger=False, barebones=True)


def test_a_glob_without_a_match_names_near_ones() -> None:
    with pytest.raises(ValueError, match=r"stages\.3: no parameter matches 'nets\.1\.\*'\. Near: .*net\.1\.\*"):
        StagedFreezing({3: ["nets.1.*"]}).setup(cpu_trainer(), ToyModule(), "fit")


def test_a_stage_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stages\.2 leaves nothing to train"):
        StagedFreezing({2: ["*"]}).setup(cpu_trainer(), ToyModule(), "fit")


@pytest.mark.parametrize(("stages", "unit"), [({}, "epoch"), ({-1: []}, "epoch"), ({0: []}, "images")])
def test_impossible_arguments_are_refused(stages: dict[int, list[str]], unit: Any) -> None:
    with pytest.raises(ValueError, match="staged_freezing"):
        StagedFreezing(stages, unit)


def test_a_checkpoint_of_other_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="stage that begins at epoch 5"):
        StagedFreezing({0: [FIRST], 2: []}).load_state_dict({"stage": 5})


STAGED = {"epochs": 3, "more": ((StagedFreezing, {"stages": {0: [FIRST, NORM], 1: [], 2: [LAST]}}),)}


def test_ranks_stay_equal_through_every_change(tmp_path: Path) -> None:
    assert run(train, Run(tmp_path, **STAGED), log=tmp_path / "log.txt", ranks=2) == [0, 0]
    a, b = end(tmp_path, 0)["module"], end(tmp_path, 1)["module"]
    statistics = {name for name in a if "running_" in name}  # each rank's own, until the next forward
    assert set(differences(a, b)) <= {f".{name}" for name in statistics}
    assert "of 291 parameters train" in (tmp_path / "log.txt").read_text()


IN_STAGE_0, AT_STAGE_1, IN_STAGE_1 = ("batch start", 0, 4), ("batch start", 1, 0), ("batch start", 1, 5)


@pytest.mark.parametrize(
    ("place", "ranks"), [(IN_STAGE_0, 1), (AT_STAGE_1, 1), (IN_STAGE_1, 1), (AT_STAGE_1, 2), (IN_STAGE_1, 2)]
)
def test_resume_within_any_stage_is_bitwise(place: tuple[str, int, int], ranks: int, tmp_path: Path) -> None:
    folders = [tmp_path / "plain", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    assert run(train, Run(folders[0], **STAGED), log=folders[0] / "log.txt", ranks=ranks) == [0] * ranks
    log = folders[1] / "log.txt"
    asked = Run(folders[1], kill_at=place, kill_rank=-1, kill_with=signal.SIGKILL, **STAGED)
    assert -signal.SIGKILL in run(train, asked, log=log, ranks=ranks)
    assert run(train, Run(folders[1], **STAGED), True, log=log, ranks=ranks) == [0] * ranks, log.read_text()
    for rank in range(ranks):
        assert differences(end(folders[1], rank), end(folders[0], rank)) == []
