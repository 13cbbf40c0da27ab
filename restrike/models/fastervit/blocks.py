"""FasterViT's blocks. Attribute names are those of the released checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from restrike.models.fastervit.positions import CoordinateMlp, Grid, RelativeBias, TokenEmbedding
from restrike.models.fastervit.windows import carriers_to_raster, carriers_to_windows, upsample_carriers
from restrike.models.layers.linear import Linear
from restrike.models.layers.mlp import Mlp


class PatchEmbed(nn.Module):
    """Two strided convolutions: [B, in_chans, H, W] -> [B, dim, H/4, W/4]."""

    def __init__(self, in_chans: int, in_dim: int, dim: int) -> None:
        super().__init__()
        # eps 1e-4 here, 1e-5 in every other BatchNorm.
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_chans, in_dim, 3, 2, 1, bias=False),
            nn.BatchNorm2d(in_dim, eps=1e-4),
            nn.ReLU(),
            nn.Conv2d(in_dim, dim, 3, 2, 1, bias=False),
            nn.BatchNorm2d(dim, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_down(x)


class ConvBlock(nn.Module):
    """Residual pair of 3x3 convolutions (paper eq. 1); no activation after the sum."""

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale: float | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.act1 = nn.GELU()
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale is not None else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        gamma = self.gamma.view(-1, 1, 1) if self.gamma is not None else None
        return add_branch(x, branch, gamma, self.drop_path)


class Downsample(nn.Module):
    """LayerNorm over channels, then a strided convolution: [B, C, H, W] -> [B, 2C, ceil(H/2), ceil(W/2)]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Attention(nn.Module):
    """Multi-head self-attention with an additive bias that depends on positions only (`pos_emb_funct`)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        side: int,
        num_tokens: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} of the stage is not a multiple of its num_heads={num_heads}")
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.pos_emb_funct = RelativeBias(side, num_heads, num_tokens)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: [B, N, C]; bias: [1, num_heads, N, N]."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = biased_attention(q, k, v, bias.to(q.dtype), self.scale, self.attn_drop)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)))


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, dropout: nn.Dropout) -> Tensor:
    """softmax(q k^T * scale + bias) v. q, k, v: [B, num_heads, N, head_dim]; bias: [1, num_heads, N, N]."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # On a CPU the fused kernel has no gradient for the bias; what it falls back to is 20 % slower than this
        # (float32, 49 to 576 tokens). Without gradients it is 5 to 50 % faster.
        return dropout(((q * scale) @ k.mT + bias).softmax(dim=-1)) @ v
    # Heads of 49 channels (FasterViT-4) get a GPU's memory-efficient kernel only when padded.
    return fused_attention(q, k, v, bias, scale, dropout.p if dropout.training else 0.0, multiple=8 if q.is_cuda else 1)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, dropout: float = 0.0, multiple: int = 1
) -> Tensor:
    """The same in one kernel, with the channels of a head padded by zeros to a multiple."""
    head_dim = q.shape[-1]
    if head_dim % multiple:
        q, k, v = (F.pad(t, (0, -head_dim % multiple)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)[..., :head_dim]


class Positions(NamedTuple):
    """Positional terms of one block for one grid of windows; the last two exist for blocks with carrier tokens."""

    tokens: Tensor  # [1, w^2, C], added to the window's tokens
    bias: Tensor  # [1, num_heads, c^2 + w^2, c^2 + w^2], or w^2 without carriers
    carriers: Tensor | None = None  # [1, T, C], added to the carriers in raster order
    carrier_bias: Tensor | None = None  # [1, num_heads, T, T]


class WindowBlock(nn.Module):
    """Attention within windows; with `carrier_grid`, hierarchical attention through carrier tokens (paper eqs. 5-9).

    Args:
        carrier_grid: (a, b) windows of the feature map that the carriers are built for, None for a block without
            carriers. A square grid has a positional embedding for them, another has none, as in the release.
        propagate: add the window's carriers, upsampled, to its tokens at the end.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        *,
        carrier_size: int = 2,
        carrier_grid: Grid | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        propagate: bool = False,
    ) -> None:
        super().__init__()
        self.window_size, self.carrier_size, self.propagate = window_size, carrier_size, propagate
        self.is_hierarchical = carrier_grid is not None
        num_tokens = window_size**2

        def scale(used: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.full((dim,), layer_scale)) if used and layer_scale is not None else None

        def attention(side: int, tokens: int) -> Attention:
            return Attention(dim, num_heads, side, tokens, qkv_bias, attn_drop, proj_drop)

        def mlp() -> Mlp:
            return Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)

        # This order is the order of parameters in released optimiser states.
        self.gamma3, self.gamma4 = scale(True), scale(True)
        self.gamma1, self.gamma2 = scale(self.is_hierarchical), scale(self.is_hierarchical)
        self.pos_embed = TokenEmbedding(dim, num_tokens)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention(window_size, num_tokens + (carrier_size**2 if self.is_hierarchical else 0))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp()
        self.drop_path = DropPath(drop_path)
        self.hat_pos_embed: TokenEmbedding | None = None
        if carrier_grid is not None:
            num_carriers = carrier_size**2 * carrier_grid[0] * carrier_grid[1]
            self.hat_norm1 = nn.LayerNorm(dim)
            self.hat_norm2 = nn.LayerNorm(dim)
            self.hat_attn = attention(int(num_carriers**0.5), num_carriers)
            self.hat_mlp = mlp()
            if carrier_grid[0] == carrier_grid[1]:
                self.hat_pos_embed = TokenEmbedding(dim, num_carriers)

    def forward(
        self, windows: Tensor, carriers: Tensor | None, positions: Positions, grid: Grid, as_released: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """windows: [B * a * b, w^2, C]; carriers: [B, T, C] window-major or None; grid: (a, b). Same shapes out."""
        x = windows + positions.tokens.to(windows.dtype)
        if carriers is not None:
            carriers = self._mix_carriers(carriers, positions, grid, as_released)
            x = torch.cat([carriers.reshape(-1, self.carrier_size**2, x.shape[-1]), x], dim=1)
        x = add_branch(x, self.attn(self.norm1(x), positions.bias), self.gamma3, self.drop_path)
        x = add_branch(x, self.mlp(self.norm2(x)), self.gamma4, self.drop_path)
        if carriers is None:
            return x, None
        own, x = x.tensor_split([self.carrier_size**2], dim=1)
        if self.propagate:
            grown = upsample_carriers(own, self.carrier_size, self.window_size)
            x = x + grown if self.gamma1 is None else torch.addcmul(x, self.gamma1, grown)
        return x, own.reshape(carriers.shape)

    def positional_mlps(self) -> list[CoordinateMlp]:
        """What the positional terms are computed from."""
        mlps = [self.pos_embed.cpb_mlp, self.attn.pos_emb_funct.cpb_mlp]
        if self.is_hierarchical:
            mlps.append(self.hat_attn.pos_emb_funct.cpb_mlp)
        if self.hat_pos_embed is not None:
            mlps.append(self.hat_pos_embed.cpb_mlp)
        return mlps

    def _mix_carriers(self, carriers: Tensor, positions: Positions, grid: Grid, as_released: bool) -> Tensor:
        """Attention among all carriers of an image."""
        assert positions.carrier_bias is not None
        x = carriers_to_raster(carriers, grid, self.carrier_size)
        if positions.carriers is not None:
            x = x + positions.carriers.to(x.dtype)
        x = add_branch(x, self.hat_attn(self.hat_norm1(x), positions.carrier_bias), self.gamma1, self.drop_path)
        x = add_branch(x, self.hat_mlp(self.hat_norm2(x)), self.gamma2, self.drop_path)
        return carriers_to_windows(x, grid, self.carrier_size, as_released)


def add_branch(x: Tensor, branch: Tensor, gamma: Tensor | None, drop_path: DropPath) -> Tensor:
    """x + drop_path(gamma * branch), in one pass over the tokens. Stochastic depth drops rows of dimension 0."""
    factor = gamma
    if drop_path.training and drop_path.drop_prob > 0:
        keep = drop_path(branch.new_ones((len(branch),) + (1,) * (branch.ndim - 1)))
        factor = keep if gamma is None else keep * gamma
    return x + branch if factor is None else torch.addcmul(x, factor, branch)
