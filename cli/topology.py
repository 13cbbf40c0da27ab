"""How many processes there are: from the launcher that started us, or from the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cli.errors import UserError


@dataclass(frozen=True)
class Topology:
    """`devices` per node x `num_nodes`, and who decided it."""

    devices: Any
    num_nodes: int
    source: str

    def describe(self) -> str:
        """One line for the start of a run."""
        return f"{self.num_nodes} node(s) x {self.devices} device(s), by {self.source}"


def _launched(env: Mapping[str, str]) -> tuple[int, int, str] | None:
    """(processes per node, nodes, launcher) as the environment says, or None outside a launcher."""
    if "TORCHELASTIC_RUN_ID" in env or ("LOCAL_WORLD_SIZE" in env and "WORLD_SIZE" in env):
        per_node = int(env["LOCAL_WORLD_SIZE"])
        return per_node, int(env["WORLD_SIZE"]) // per_node, "torchrun"
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        tasks, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", "1"))
        if tasks > 1 and "SLURM_STEP_ID" not in env:
            raise UserError(
                f"this is a SLURM job of {tasks} tasks, but not one of them: start the command with srun inside sbatch"
            )
        if tasks % nodes:
            raise UserError(f"SLURM gives {tasks} tasks on {nodes} nodes: ask for --ntasks-per-node=<GPUs per node>")
        return tasks // nodes, nodes, "SLURM"
    return None


def resolve_topology(devices: Any, num_nodes: int, env: Mapping[str, str]) -> Topology:
    """Fill `devices: auto` from the launcher; refuse numbers that contradict it.

    Raises:
        UserError: the recipe's numbers differ from the launcher's, or sbatch without srun.
    """
    launched = _launched(env)
    if launched is None:
        return Topology(devices, num_nodes, "the recipe")
    per_node, nodes, launcher = launched
    if devices == "auto":
        return Topology(per_node, nodes, launcher)
    wanted = len(devices) if isinstance(devices, list) else int(devices)
    if (wanted, num_nodes) != (per_node, nodes):
        raise UserError(
            f"{launcher} started {nodes} node(s) x {per_node} process(es), the config says {num_nodes} x {wanted}: "
            f"set --trainer.devices {per_node} --trainer.num_nodes {nodes}, or --trainer.devices auto"
        )
    return Topology(devices, num_nodes, launcher)
