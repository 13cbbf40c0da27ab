"""What a config may name, and how many processes there are."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cli import registry
from cli.errors import UserError
from cli.topology import Topology, launch_traps, resolve_topology

TORCHRUN = {"TORCHELASTIC_RUN_ID": "r", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "32"}
SLURM = {"SLURM_NTASKS": "32", "SLURM_NNODES": "4", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", "torch.hub.load", "torch.load", "timmy.X"])
def test_classes_outside_the_registry_are_refused_with_the_opt_in(path):
    with pytest.raises(UserError, match="--allow_class_path"):
        registry.check({"callbacks": {"x": [{"class_path": path}]}})
    registry.check({"callbacks": {"x": {"class_path": path}}}, extra=[path])


@pytest.mark.parametrize("path", ["callbacks.EMA", "torch.optim.AdamW", "lightning.pytorch.callbacks.Timer", "Timer"])
def test_classes_of_the_registry_are_allowed(path):
    registry.check({"class_path": path})


@pytest.mark.parametrize(("env", "by"), [(TORCHRUN, "torchrun"), (SLURM, "SLURM")])
def test_auto_takes_the_launchers_numbers(env, by):
    topology = resolve_topology("auto", 1, env)
    assert (topology.devices, topology.num_nodes, topology.source) == (8, 4, by)
    assert resolve_topology(8, 4, env).devices == 8


@pytest.mark.parametrize("env", [TORCHRUN, SLURM])
@pytest.mark.parametrize(("devices", "nodes"), [(8, 1), (4, 4), ([0, 1], 4), ("2", 4)])
def test_numbers_that_contradict_the_launcher_are_refused(env, devices, nodes):
    with pytest.raises(UserError, match="--trainer.devices 8 --trainer.num_nodes 4"):
        resolve_topology(devices, nodes, env)


def test_sbatch_without_srun_is_refused():
    with pytest.raises(UserError, match="srun"):
        resolve_topology("auto", 1, {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"})


def test_tasks_that_do_not_divide_over_nodes_are_refused():
    with pytest.raises(UserError, match="ntasks-per-node"):
        resolve_topology("auto", 1, SLURM | {"SLURM_NTASKS": "30"})


def test_without_a_launcher_the_recipe_decides():
    assert resolve_topology(2, 1, {}).devices == 2
    assert resolve_topology("auto", 1, {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}).devices == "auto"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"TORCHELASTIC_RUN_ID": "r"}, "LOCAL_WORLD_SIZE is ''"),
        (TORCHRUN | {"WORLD_SIZE": "12"}, "12 processes are not a multiple of 8"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "at least 1"),
        (SLURM | {"SLURM_NTASKS": "two"}, "SLURM_NTASKS is 'two'"),
    ],
)
def test_a_broken_environment_is_named(env, message):
    with pytest.raises(UserError, match=message):
        resolve_topology("auto", 1, env)


def test_one_slurm_task_without_srun_cannot_be_two_devices():
    env = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "1"}
    with pytest.raises(UserError, match="SLURM started 1 node"):
        resolve_topology(2, 1, env)


def traps(topology: Topology, env: dict[str, str]) -> str:
    return "\n".join(launch_traps(topology, env))


def test_known_traps_of_launchers_are_told():
    alone, slurm = Topology(8, 4, "the recipe"), Topology(8, 4, "SLURM")
    assert "no launcher is at work" in traps(alone, {})
    assert traps(slurm, {}) == traps(Topology(8, 1, "the recipe"), {}) == ""
    assert "--gpus-per-node" in traps(slurm, {"SLURM_GPUS_PER_TASK": "1"})
    assert "MASTER_ADDR and MASTER_PORT set by hand" in traps(slurm, {"MASTER_ADDR": "a", "MASTER_PORT": "1x"})
    assert traps(Topology(8, 4, "torchrun"), {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}) == ""


def test_a_port_in_use_is_told():
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = str(held.getsockname()[1])
        assert f"MASTER_PORT {port} is taken" in traps(Topology(2, 1, "the recipe"), {"MASTER_PORT": port})
    assert "is taken" not in traps(Topology(2, 1, "the recipe"), {"MASTER_PORT": port})


def test_torchrun_starts_two_processes_of_one_run(tmp_path):
    recipe = Path(__file__).parent / "recipes" / "conf" / "tiny.yaml"
    project = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "cli",
        "fit",
    ]
    command += ["--config", str(recipe), "--trainer.devices", "auto", "--trainer.strategy", "ddp"]
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert text.count("1 node(s) x 2 device(s), by torchrun") == 1
    assert "Starting with 2 processes" in text
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["tiny"]
