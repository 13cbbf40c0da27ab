"""What a view looked like, to where it was: an associative memory read before and written after each view.

A slot holds [key, value]: the key comes from the mean of a view's tokens, the value is its pose token after decoding.
(The released checkpoints' name is `pose_retriever`; the paper, arXiv 2501.12387, leaves this part to the code.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restrike.models.cut3r.blocks import DecoderBlock
from restrike.models.layers.linear import Linear

_INIT_STD = 0.2
_NUM_BLOCKS = 2


class PoseMemory(nn.Module):
    """Memory [B, M, 2 dim].

    Args:
        key_dim: Width of the tokens that keys are made of.
        dim: Width of keys and values.
        num_slots: M.
        num_heads: Of the blocks, whose width is 2 dim.
        mlp_ratio: Hidden width of the MLPs over 2 dim.
    """

    def __init__(self, key_dim: int, dim: int, num_slots: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.dim = dim
        self.masked_token = nn.Parameter(_INIT_STD * torch.randn(1, 1, dim))
        self.mem = nn.Parameter(_INIT_STD * torch.randn(1, num_slots, 2 * dim))
        self.proj_q = Linear(key_dim, dim)

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(DecoderBlock(2 * dim, num_heads, mlp_ratio) for _ in range(_NUM_BLOCKS))

        self.write_blocks, self.read_blocks = blocks(), blocks()

    def read(self, key: Tensor, memory: Tensor) -> Tensor:
        """Pose token [B, 1, dim] that the memory [B, M, 2 dim] has for a view's key [B, 1, dim] (after `proj_q`)."""
        x = torch.cat([key, self.masked_token.to(key.dtype).expand_as(key)], dim=-1)
        for block in self.read_blocks:
            x = block(x, memory)
        return x[..., self.dim :]

    def write(self, key: Tensor, value: Tensor, memory: Tensor) -> Tensor:
        """The memory after a view with this key and pose token, each [B, 1, dim]."""
        feature = torch.cat([key, value.to(key.dtype)], dim=-1)
        for block in self.write_blocks:
            memory = block(memory, feature)
        return memory

    def never_used(self) -> list[nn.Parameter]:
        """Parameters that no output depends on: those of queries and keys where there is one key."""
        parts: list[nn.Module] = []
        for block in self.write_blocks:
            assert isinstance(block, DecoderBlock)
            parts += [block.norm2, block.cross_attn.projq, block.cross_attn.projk]
        return [parameter for part in parts for parameter in part.parameters()]
