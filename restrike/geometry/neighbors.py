"""Exact nearest neighbours of point clouds, in plain torch: on any device, without a tree library.

Both clouds are cut into boxes of equal count. Boxes of queries visit boxes of points from near to far, many at once,
each with those of its queries that are nearer to the next box than to the worst neighbour found: the same answer as
comparing all with all, at a small part of the work. Distances come from differences, not from |a|² - 2ab + |b|², so
they keep all their digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from restrike.geometry.conventions import check_trailing

_LEAF = 64  # measured fastest on one core among 16..128
_LEAVES_AT_ONCE = 256  # x leaf x leaf float64: 8 MiB a temporary
_VISITS = 32


class Neighbors(NamedTuple):
    """Distances and indices of the k nearest points, [N, k] each, nearest first."""

    distances: Tensor
    indices: Tensor


class _Leaves(NamedTuple):
    """Coordinates [leaves, 3, size], indices [leaves, size] (-1: padding), bounding boxes [leaves, 3] twice."""

    points: Tensor
    indices: Tensor
    low: Tensor
    high: Tensor


@torch.no_grad()
def nearest_neighbors(queries: Tensor, points: Tensor, k: int = 1) -> Neighbors:
    """The `k` points nearest to each query, exactly.

    Args:
        queries: [N, 3], finite.
        points: [M, 3], finite, M ≥ k.
        k: How many.

    Returns:
        Neighbors in the dtype of the input.

    Raises:
        ValueError: fewer than `k` points, or coordinates that are not finite.
    """
    check_trailing("queries", queries, 3)
    check_trailing("points", points, 3)
    if not 1 <= k <= len(points):
        raise ValueError(f"k: expected 1 to {len(points)}, the number of points, got {k}")
    if not (queries.isfinite().all() and points.isfinite().all()):
        raise ValueError(
            "a cloud has NaN or infinite coordinates: drop those points first, `cloud[cloud.isfinite().all(-1)]`"
        )
    distances = queries.new_empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    if len(queries) == 0:
        return Neighbors(distances, indices)
    point_leaves, query_leaves = _split(points), _split(queries)
    for start in range(0, len(query_leaves.points), _LEAVES_AT_ONCE):
        part = _Leaves(*(x[start : start + _LEAVES_AT_ONCE] for x in query_leaves))
        squares, found = _search(part, point_leaves, k)
        is_real = part.indices >= 0
        rows = part.indices[is_real]
        distances[rows], indices[rows] = squares[is_real].sqrt(), found[is_real]
    return Neighbors(distances, indices)


def _split(points: Tensor) -> _Leaves:
    levels = max(0, (-(-len(points) // _LEAF) - 1).bit_length())
    size = -(-len(points) // 2**levels)
    padding = size * 2**levels - len(points)
    padded = torch.cat([points, points[:1].expand(padding, 3)])
    order = torch.arange(len(padded), device=points.device)[None]
    while levels > 0:
        halvings = min(levels, 2)  # at once, by one sort
        block = padded[order]
        axis = (block.amax(1) - block.amin(1)).argmax(-1)
        coordinate = block.take_along_dim(axis[:, None, None], dim=-1)[..., 0]
        order = order.gather(1, coordinate.argsort(dim=1)).reshape(2**halvings * len(order), -1)
        levels -= halvings
    leaves = padded[order]
    indices = torch.where(order < len(points), order, -1)
    return _Leaves(leaves.mT.contiguous(), indices, leaves.amin(1), leaves.amax(1))


def _search(queries: _Leaves, points: _Leaves, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances and indices, [query leaves, size, k] each."""
    gap = torch.maximum(queries.low[:, None] - points.high, points.low - queries.high[:, None]).clamp(min=0)
    bounds = gap.square().sum(-1)
    best = bounds.new_full((*queries.indices.shape, k), torch.inf)
    found = torch.full_like(best, -1, dtype=torch.int64)
    active = torch.arange(len(best), device=best.device)
    while len(active) > 0:
        # The next few boxes by distance, rather than a sort of all: few searches go on beyond them.
        visits = bounds.topk(min(_VISITS, bounds.shape[1]), dim=1, largest=False).indices
        for leaf in visits.unbind(1):
            active = active[bounds[active, leaf[active]] <= best[active, :, -1].amax(1)]
            if len(active) == 0:
                break
            boxes, own, worst = leaf[active], queries.points[active], best[active, :, -1]
            place: tuple[Tensor, ...] = (active,)
            if not worst.isinf().all():  # of a leaf's queries, few are nearer to the next box than to what they have
                rows, columns = (_square_gap(own, points, boxes) <= worst).nonzero().unbind(1)
                boxes, own, place = boxes[rows], own[rows, :, columns, None], (active[rows], columns)
            squares = _squared_distances(own, points.points.index_select(0, boxes))
            indices = points.indices.index_select(0, boxes)[:, None].expand_as(squares)
            if len(place) == 2:  # a query a row
                squares, indices = squares[:, 0], indices[:, 0]
            best[place], found[place] = _nearest(best[place], found[place], squares, indices, k)
        bounds.scatter_(1, visits, torch.inf)
    return best, found


def _square_gap(points: Tensor, leaves: _Leaves, numbers: Tensor) -> Tensor:
    """Squared distances [L, n] of points [L, 3, n] from the box of each one's leaf [L]; 0 inside."""
    below, above = leaves.low[numbers, :, None] - points, points - leaves.high[numbers, :, None]
    return torch.maximum(below, above).clamp(min=0).square().sum(1)


def _squared_distances(points: Tensor, others: Tensor) -> Tensor:
    """[Q, n, m] from [Q, 3, n] and [Q, 3, m]."""
    total = others[:, 0, None, :] - points[:, 0, :, None]
    total.square_()
    for axis in (1, 2):
        difference = others[:, axis, None, :] - points[:, axis, :, None]
        total.addcmul_(difference, difference)
    return total


def _nearest(best: Tensor, found: Tensor, squares: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of [..., k] and [..., m] squared distances, in order, and their indices.

    `squares` is changed: where its index is negative, it becomes infinite.
    """
    squares.masked_fill_(indices < 0, torch.inf)
    if k == 1:  # half as long as the general way
        squares, place = squares.min(dim=-1, keepdim=True)
        indices = indices.gather(-1, place)
    squares, place = torch.cat([best, squares], dim=-1).topk(k, dim=-1, largest=False)
    return squares, torch.cat([found, indices], dim=-1).gather(-1, place)
