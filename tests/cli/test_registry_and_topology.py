"""What a config may name, and how many processes there are."""

import pytest

from cli import registry
from cli.errors import UserError
from cli.topology import resolve_topology

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
