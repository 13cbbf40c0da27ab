"""Cameras from camera tokens, refined in a few rounds (arXiv 2503.11651, section 3.3).

Every round sees the same token, modulated by the last round's prediction, which carries no gradient. The prediction is
carried raw; its activation belongs to the output only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restrike.models.layers.block import Block, Checkpointing, run_blocks
from restrike.models.layers.linear import Linear
from restrike.models.layers.mlp import Mlp
from restrike.models.vggt.activations import activate_pose

POSE_DIM = 9
_FOV_START = 0.3  # radians a round


class CameraHead(nn.Module):
    """Camera tokens of a scene to pose encodings.

    Args:
        dim: Width of the tokens (2 C).
        depth: Blocks of the trunk, which attends over the frames of a scene.
        num_heads: Of each block.
        iterations: Rounds.
        mlp_ratio: Hidden width of the trunk's MLPs over `dim`.
        init_values: Start of the trunk's layer scales.
    """

    def __init__(
        self,
        dim: int = 2048,
        depth: int = 4,
        num_heads: int = 16,
        iterations: int = 4,
        mlp_ratio: float = 4.0,
        init_values: float = 0.01,
    ) -> None:
        super().__init__()
        self.iterations = iterations
        self.grad_checkpointing: Checkpointing = False
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_DIM))
        self.trunk = nn.ModuleList(Block(dim, num_heads, mlp_ratio, init_values=init_values) for _ in range(depth))
        self.token_norm = nn.LayerNorm(dim)
        self.trunk_norm = nn.LayerNorm(dim)
        self.embed_pose = Linear(POSE_DIM, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.pose_branch = Mlp(dim, dim // 2, out_dim=POSE_DIM)
        # The release leaves this to chance, and a field of view that starts below 0 gets no gradient through its ReLU,
        # ever: one in four small networks then learns only one of the two. Trained weights overwrite it.
        with torch.no_grad():
            self.pose_branch.fc2.bias[-2:] = _FOV_START

    def forward(self, camera_tokens: Tensor) -> list[Tensor]:
        """Camera tokens [B, V, dim] -> one encoding [B, V, 9] a round; see `restrike.geometry.encode_pose_fov`."""
        tokens = self.token_norm(camera_tokens)
        encodings: list[Tensor] = []
        raw = None
        for _ in range(self.iterations):
            previous = self.empty_pose_tokens.expand(*tokens.shape[:2], -1) if raw is None else raw.detach()
            change = self._refine(tokens, previous)
            raw = change if raw is None else previous + change
            encodings.append(activate_pose(raw))
        return encodings

    def _refine(self, tokens: Tensor, pose: Tensor) -> Tensor:
        shift, scale, gate = self.poseLN_modulation(self.embed_pose(pose)).chunk(3, dim=-1)
        x = gate * (self.adaln_norm(tokens) * (1 + scale) + shift) + tokens
        x = run_blocks(self.trunk, x, grad_checkpointing=self.grad_checkpointing)
        return self.pose_branch(self.trunk_norm(x))
