"""FasterViT's positional terms: an attention bias and a token embedding, both small MLPs over grid coordinates.

Both depend on weights only, never on the image. The bias is a function of the offset between two tokens, so the
sigmoid acts on the (2r-1)^2 offsets before they are gathered into r^4 pairs: the same numbers, many times fewer
(paper section 3.3 and Swin V2's log-spaced offsets).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restrike.models.layers.derived import DerivedBuffers, placeholder
from restrike.models.layers.linear import linear

HIDDEN = 512
Grid = tuple[int, int]  # rows, columns

_INDICES: weakref.WeakValueDictionary[tuple[Grid, torch.device], Tensor] = weakref.WeakValueDictionary()


def offset_coordinates(grid: Grid, device: torch.device | None = None) -> Tensor:
    """Log-spaced (row, column) offsets of all token pairs of a grid: [2 rows - 1, 2 columns - 1, 2], float32."""

    def axis(size: int) -> Tensor:
        scaled = 8 * torch.arange(1 - size, size, device=device, dtype=torch.float32) / max(size - 1, 1)
        return scaled.sign() * torch.log2(scaled.abs() + 1) / 3

    return torch.stack(torch.meshgrid(axis(grid[0]), axis(grid[1]), indexing="ij"), dim=-1)


def offset_index(grid: Grid, device: torch.device | None = None) -> Tensor:
    """Position of every pair's offset in the flattened `offset_coordinates`: [N, N] int64, N = rows * columns.

    Its storage is shared by all who ask for the same one (42 MB for windows of 48x48); the tensors are distinct, for
    `named_buffers` would list one tensor under one name only.
    """
    device = device if device is not None else torch.get_default_device()
    # Not under a compiler, nor under a mode whose tensors mean nothing outside of it.
    is_shareable = not torch.compiler.is_compiling() and type(torch.empty(0, device=device)) is Tensor
    if is_shareable and (shared := _INDICES.get((grid, device))) is not None:
        return shared.detach()
    with torch.inference_mode(False):
        index = _offset_index(grid, device)
    if is_shareable:
        _INDICES[grid, device] = index
    return index


def _offset_index(grid: Grid, device: torch.device) -> Tensor:
    rows = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    columns = torch.arange(grid[1], device=device).repeat(grid[0])
    down = rows[:, None] - rows[None, :] + grid[0] - 1
    right = columns[:, None] - columns[None, :] + grid[1] - 1
    return down * (2 * grid[1] - 1) + right


def token_coordinates(grid: Grid, device: torch.device | None = None) -> Tensor:
    """(row, column) of every token, [rows * columns, 2] float32. An odd side spans [-1, 1], an even one [-1, 1)."""

    def axis(size: int) -> Tensor:
        half = max(size // 2, 1)
        return (torch.arange(size, device=device, dtype=torch.float32) - size // 2) / half

    return torch.stack(torch.meshgrid(axis(grid[0]), axis(grid[1]), indexing="ij"), dim=-1).flatten(0, 1)


class CoordinateMlp(nn.Sequential):
    """2 -> 512 -> out; entries 0 and 2 have weights, under the names of released checkpoints."""

    def __init__(self, out_features: int) -> None:
        super().__init__(nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, out_features, bias=False))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """First layer's weight and bias, second layer's weight."""
        return self[0].weight, self[0].bias, self[2].weight  # type: ignore[return-value]

    def forward(self, coordinates: Tensor) -> Tensor:
        """[P, 2] -> [P, out]."""
        weight_1, bias_1, weight_2 = self.weights()
        return linear(F.linear(coordinates.to(weight_1.dtype), weight_1, bias_1).relu_(), weight_2)


def stacked_mlp(mlps: Sequence[CoordinateMlp], coordinates: Tensor) -> Tensor:
    """Apply L coordinate MLPs. coordinates: [P, 2] -> [L, P, out]."""
    if coordinates.device.type == "cpu":
        return torch.stack([mlp(coordinates) for mlp in mlps])
    return _all_at_once(mlps, coordinates)


def _all_at_once(mlps: Sequence[CoordinateMlp], coordinates: Tensor) -> Tensor:
    """For GPUs: these products are too small to fill one, and are a third of all launches if done one by one."""
    weights_1, biases_1, weights_2 = (torch.stack(w) for w in zip(*(mlp.weights() for mlp in mlps), strict=True))
    points = coordinates.to(weights_1.dtype).expand(len(mlps), -1, -1)
    return torch.bmm(torch.baddbmm(biases_1[:, None], points, weights_1.mT).relu_(), weights_2.mT)


class RelativeBias(DerivedBuffers):
    """Additive attention bias over an r x r grid of tokens, 0 for `num_leading` tokens before them.

    The leading zeros are exact: carrier tokens get bias 0 while grid tokens start near 8.

    Args:
        side: r.
        num_tokens: all tokens of the attention, num_leading + r^2.
    """

    derived_buffers = frozenset({"relative_coords_table", "relative_position_index", "relative_bias"})
    relative_coords_table: Tensor
    relative_position_index: Tensor

    def __init__(self, side: int, num_heads: int, num_tokens: int) -> None:
        super().__init__()
        self.side, self.num_heads, self.num_tokens = side, num_heads, num_tokens
        self.reset_derived()
        self.cpb_mlp = CoordinateMlp(num_heads)

    def _build_derived(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        grid = (self.side, self.side)
        shape = (1, self.num_heads, self.num_tokens, self.num_tokens)
        return {
            "relative_coords_table": offset_coordinates(grid, device).to(dtype)[None],
            "relative_position_index": offset_index(grid, device),
            "relative_bias": placeholder(*shape, device=device, dtype=dtype),
        }

    def derived_values(self) -> dict[str, Tensor]:
        bias = self(num_leading=self.num_tokens - self.side**2)
        return {
            "relative_coords_table": self.relative_coords_table,
            "relative_position_index": self.relative_position_index,
            "relative_bias": bias,
        }

    def forward(self, grid: Grid | None = None, num_leading: int = 0) -> Tensor:
        """[1, num_heads, N, N] with N = num_leading + rows * columns; the grid is r x r unless another is given."""
        return gather_bias(bias_tables([self], grid)[0], self.index(grid), num_leading)

    def index(self, grid: Grid | None = None) -> Tensor:
        """[rows * columns, rows * columns] int64, see `offset_index`."""
        if grid is None or grid == (self.side, self.side):
            return self.relative_position_index
        return offset_index(grid, self.relative_position_index.device)


def bias_tables(modules: Sequence[RelativeBias], grid: Grid | None = None) -> Tensor:
    """Bias of every offset for L modules of one shape: [L, num_heads, (2 rows - 1) * (2 columns - 1)]."""
    first = modules[0]
    if grid is None or grid == (first.side, first.side):
        coordinates = first.relative_coords_table[0]
    else:
        coordinates = offset_coordinates(grid, first.relative_coords_table.device)
    table = stacked_mlp([module.cpb_mlp for module in modules], coordinates.flatten(0, 1))
    return 16 * table.mT.sigmoid()


def gather_bias(table: Tensor, index: Tensor, num_leading: int = 0) -> Tensor:
    """[num_heads, offsets] and [N0, N0] -> [1, num_heads, N, N], zero in the first `num_leading` rows and columns."""
    if num_leading:
        # One more table entry, 0, stands for every pair that has a leading token in it.
        index = F.pad(index, (num_leading, 0, num_leading, 0), value=table.shape[-1])
        table = F.pad(table, (0, 1))
    return table[:, index.flatten()].unflatten(-1, index.shape)[None]


class TokenEmbedding(DerivedBuffers):
    """Embedding of a token's place in its grid, added to the tokens. `num_tokens` = side^2."""

    derived_buffers = frozenset({"relative_bias"})

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.dim, self.num_tokens, self.side = dim, num_tokens, int(num_tokens**0.5)
        self.reset_derived()
        self.cpb_mlp = CoordinateMlp(dim)

    def _build_derived(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"relative_bias": placeholder(1, self.num_tokens, self.dim, device=device, dtype=dtype)}

    def derived_values(self) -> dict[str, Tensor]:
        return {"relative_bias": self()}

    def forward(self, grid: Grid | None = None) -> Tensor:
        """[1, rows * columns, dim]; the grid is side x side unless another is given."""
        return token_embeddings([self], grid)


def token_embeddings(modules: Sequence[TokenEmbedding], grid: Grid | None = None) -> Tensor:
    """[L, rows * columns, dim] for L modules of one shape."""
    first = modules[0]
    device = first.cpb_mlp.weights()[0].device
    return stacked_mlp([module.cpb_mlp for module in modules], token_coordinates(grid or (first.side,) * 2, device))
