"""Weights, gradients and optimiser state split over the ranks (FSDP2), for networks that one GPU can't train."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_modules.networks import repeated_blocks


def is_sharded(net: nn.Module) -> bool:
    """Whether `shard_network` has seen it."""
    return isinstance(net, FSDPModule)


def shard_network(net: nn.Module, device_mesh: DeviceMesh) -> int:
    """Shard in place: each repeated block gathers its weights when its turn comes, what is left goes with the whole.

    Names in the state dict stay as they are. A block whose parameters are only partly frozen can't be sharded: freeze
    whole blocks, before this.

    Args:
        net: The network, not sharded yet.
        device_mesh: Of `ModelParallelStrategy`, with the dimensions "data_parallel" and "tensor_parallel".

    Returns:
        How many blocks were sharded on their own.

    Raises:
        ValueError: the mesh asks for tensor parallelism.
    """
    tensor_parallel = device_mesh["tensor_parallel"].size()
    if tensor_parallel != 1:
        raise ValueError(
            f"trainer.strategy: tensor_parallel_size is {tensor_parallel}, but networks are split over "
            "data_parallel_size alone: set tensor_parallel_size to 1 and data_parallel_size to the number of processes"
        )
    mesh = device_mesh["data_parallel"]
    blocks = repeated_blocks(net)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return len(blocks)
