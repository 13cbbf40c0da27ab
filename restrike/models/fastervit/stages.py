"""FasterViT's stages: blocks, then a strided downsampling in all but the last.

Between stages x is [B, C, H, W] in channels-last memory, so that a stage's token view [B, H, W, C] costs no copy.
`forward_blocks` is the map before downsampling (what feature extraction returns), `forward` the map after it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from restrike.models.fastervit.blocks import ConvBlock, Downsample, Positions, WindowBlock
from restrike.models.fastervit.position_cache import PositionCache
from restrike.models.fastervit.positions import Grid, bias_tables, gather_bias, token_embeddings
from restrike.models.fastervit.windows import GlobalTokenizer, from_windows, to_windows


class Stage(nn.Module):
    """Blocks, then `downsample` (None in the last stage)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    @abstractmethod
    def forward_blocks(self, x: Tensor) -> Tensor:
        """The map before downsampling."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_blocks(x)
        return x if self.downsample is None else self.downsample(x)

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if not (self.grad_checkpointing and self.training):
            return block(*args)
        return checkpoint(
            block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(block))
        )


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """While a block is recomputed: BatchNorm has counted this batch already."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class ConvStage(Stage):
    def __init__(
        self, dim: int, downsample: bool, drop_paths: Sequence[float], layer_scale_conv: float | None = None
    ) -> None:
        blocks = [ConvBlock(dim, rate, layer_scale_conv) for rate in drop_paths]
        super().__init__(blocks, Downsample(dim) if downsample else None)

    def forward_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self._run(block, x)
        return x


class AttentionStage(Stage):
    """Windowed attention, hierarchical where the constructor's resolution gives more than one window and `hat` is set.

    Args:
        feature_size: (H, W) of the feature map at the constructor's resolution, already a multiple of the window.
        pad: zero-pad maps to multiples of the window; otherwise they must be multiples.
        as_released: compute grids with unequal sides as the release does: no positional embedding for carriers,
            carriers dealt out to other windows after each block, and a bias made for a square that covers the last
            carriers only. False gives the evident intention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        feature_size: tuple[int, int],
        *,
        hat: bool,
        pad: bool,
        downsample: bool,
        drop_paths: Sequence[float],
        carrier_size: int = 2,
        propagate: bool = False,
        as_released: bool = True,
        **block_args: Any,
    ) -> None:
        grid = feature_size[0] // window_size, feature_size[1] // window_size
        is_hierarchical = hat and grid != (1, 1)
        blocks = [
            WindowBlock(
                dim,
                num_heads,
                window_size,
                carrier_size=carrier_size,
                carrier_grid=grid if is_hierarchical else None,
                drop_path=rate,
                propagate=propagate and is_hierarchical and index == len(drop_paths) - 1,
                **block_args,
            )
            for index, rate in enumerate(drop_paths)
        ]
        super().__init__(blocks, Downsample(dim) if downsample else None)
        self.window_size, self.carrier_size = window_size, carrier_size
        self.pad, self.as_released, self.is_hierarchical = pad, as_released, is_hierarchical
        self.position_cache = PositionCache()
        self._own_grid = grid if is_hierarchical else None
        # Released any-resolution models have a tokenizer even where one window leaves it without use.
        self.global_tokenizer: GlobalTokenizer | None = None
        if is_hierarchical or (hat and pad):
            self.global_tokenizer = GlobalTokenizer(dim, window_size, carrier_size)
            # Without this, data-parallel training waits for gradients that never come.
            self.global_tokenizer.requires_grad_(is_hierarchical)

    def forward_blocks(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x, grid = self._fit_windows(x)
        # One window needs no carriers: so would a model built for this size have none.
        uses_carriers = self.is_hierarchical and grid != (1, 1)
        carriers = self.global_tokenizer(x) if uses_carriers and self.global_tokenizer is not None else None
        positions = self.positions(grid if uses_carriers else None)
        windows = to_windows(x.permute(0, 2, 3, 1), self.window_size)
        for block, position in zip(self.blocks, positions, strict=True):
            windows, carriers = self._run(block, windows, carriers, position, grid, self.as_released)
        x = from_windows(windows, grid, self.window_size)
        return x[:, :height, :width].permute(0, 3, 1, 2)

    def _fit_windows(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Pad (right and bottom) or check; also (a, b), the number of windows."""
        height, width = x.shape[-2:]
        down, right = -height % self.window_size, -width % self.window_size
        if (down or right) and not self.pad:
            raise ValueError(
                f"a feature map of {height}x{width} does not divide into windows of {self.window_size}x"
                f"{self.window_size}; give this model images of its own resolution or a multiple of it, or use the "
                "'_any_res' model of the same variant, which takes any size"
            )
        if down or right:
            x = F.pad(x, (0, right, 0, down)).contiguous(memory_format=torch.channels_last)
        return x, (x.shape[-2] // self.window_size, x.shape[-1] // self.window_size)

    def positions(self, carrier_grid: Grid | None) -> Iterable[Positions]:
        """Positional terms of every block, for a grid of windows with carriers or (None) for windows without."""
        blocks, area = self._blocks(), self.carrier_size**2
        a, b = carrier_grid or (0, 0)
        num_pairs = (self.window_size**2 + (area if carrier_grid else 0)) ** 2 + (area * a * b) ** 2
        num_bytes = 4 * len(blocks) * blocks[0].attn.num_heads * num_pairs
        return self.position_cache.get(blocks, carrier_grid, lambda: self._compute_positions(carrier_grid), num_bytes)

    @torch.no_grad()
    def freeze_positions(self) -> None:
        """Keep the terms of the constructor's resolution for good, in deployed models."""
        self.position_cache.freeze(self._own_grid, self._compute_positions(self._own_grid))

    def _blocks(self) -> list[WindowBlock]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttentionStage:
        super()._apply(fn, recurse)
        if self.position_cache.is_frozen:
            self.freeze_positions()
        return self

    def _compute_positions(self, carrier_grid: Grid | None) -> Iterator[Positions]:
        """One block after the other: at 768 pixels all biases of a stage are 4 GB."""
        blocks = self._blocks()
        tokens = token_embeddings([block.pos_embed for block in blocks])
        tables = bias_tables([block.attn.pos_emb_funct for block in blocks])
        index = blocks[0].attn.pos_emb_funct.index()
        if carrier_grid is None:
            for i in range(len(blocks)):
                yield Positions(tokens[i : i + 1], gather_bias(tables[i], index))
            return
        carriers = self._carrier_positions(carrier_grid)
        for i, (embedding, carrier_bias) in enumerate(carriers):
            bias = gather_bias(tables[i], index, num_leading=self.carrier_size**2)
            yield Positions(tokens[i : i + 1], bias, embedding, carrier_bias)

    def _carrier_positions(self, grid: Grid) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Embedding [1, T, C] (or None) and bias [1, num_heads, T, T] of each block."""
        blocks = self._blocks()
        carriers = grid[0] * self.carrier_size, grid[1] * self.carrier_size
        num_carriers = carriers[0] * carriers[1]
        is_plain = grid[0] == grid[1] or not self.as_released
        modules = [block.hat_pos_embed for block in blocks if block.hat_pos_embed is not None]
        embeddings = token_embeddings(modules, carriers) if is_plain and modules else None
        bias_grid = carriers if is_plain else (int(num_carriers**0.5),) * 2
        functions = [block.hat_attn.pos_emb_funct for block in blocks]
        index = functions[0].index(bias_grid)
        num_leading = num_carriers - bias_grid[0] * bias_grid[1]
        for i, table in enumerate(bias_tables(functions, bias_grid)):
            embedding = None if embeddings is None else embeddings[i : i + 1]
            yield embedding, gather_bias(table, index, num_leading)
