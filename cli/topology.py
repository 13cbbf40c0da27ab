"""How many processes there are: from the launcher that started us, or from the recipe."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
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
        per_node, world = _number(env, "LOCAL_WORLD_SIZE"), _number(env, "WORLD_SIZE")
        if world % per_node:
            raise UserError(
                f"torchrun: {world} processes are not a multiple of {per_node} per node; give every node as many"
            )
        return per_node, world // per_node, "torchrun"
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        tasks, nodes = _number(env, "SLURM_NTASKS"), _number({"SLURM_NNODES": "1", **env}, "SLURM_NNODES")
        if tasks > 1 and "SLURM_STEP_ID" not in env:
            raise UserError(
                f"this is a SLURM job of {tasks} tasks, but not one of them: start the command with srun inside sbatch"
            )
        if tasks % nodes:
            raise UserError(f"SLURM gives {tasks} tasks on {nodes} nodes: ask for --ntasks-per-node=<GPUs per node>")
        return tasks // nodes, nodes, "SLURM"
    return None


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"the launcher's {name} is '{value}', expected a number of at least 1: was it set by hand?")
    return int(value)


def launch_traps(topology: Topology, env: Mapping[str, str]) -> Iterator[str]:
    """What is known to go wrong later, one sentence each, though the numbers fit."""
    launched = topology.source != "the recipe"
    if topology.num_nodes > 1 and not launched:
        yield (
            f"the recipe asks for {topology.num_nodes} nodes, and no launcher is at work here: start it with torchrun "
            "or srun on every node"
        )
    if env.get("SLURM_GPUS_PER_TASK") == "1" and topology.devices != 1:
        yield "--gpus-per-task=1 shows each task one GPU, but a task picks its own of all: ask for --gpus-per-node"
    if launched and topology.source != "SLURM":
        return  # torchrun has taken address and port already, and for good reason
    ours = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in env]
    if ours:
        yield f"{' and '.join(ours)} set by hand: right only if no other run on that machine uses the same"
    port = env.get("MASTER_PORT", "")
    if port.isdigit() and _is_taken(int(port)):
        yield f"MASTER_PORT {port} is taken on this machine: unset it, or choose a free one"


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


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
