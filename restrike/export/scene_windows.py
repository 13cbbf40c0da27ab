"""Many photos in windows that overlap: each is a scene of its own, and photos that two share bring them together.

A network's memory grows with its views; windows bound it. A photo that both windows have gives the rotation and the
place of one world in the other by its two cameras, and the unit of length by its two depth maps. Medians over photos
and pixels, as a fit to points would follow the far background, whose depth is the worst.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from restrike.geometry import Similarity, invert_se3, multiply, nearest_rotation, rotate

_GRID = 64  # pixels of a shared photo that are compared, along each side


class WindowView(NamedTuple):
    """A photo's part in a window: intrinsics [3, 3] and crop_box [4] in pixels of the photo, world_to_camera [3, 4],
    depth [P, Q], confidence [P, Q] or None."""

    intrinsics: Tensor
    world_to_camera: Tensor
    depth: Tensor
    confidence: Tensor | None
    crop_box: Tensor


def windows(count: int, size: int, overlap: int) -> list[range]:
    """Rows of each window: `size` at most, `overlap` of them shared with the window before.

    Raises:
        ValueError: windows that do not move on.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"data.overlap: expected 0 … {size - 1} (below data.max_views), got {overlap}")
    starts = range(0, max(1, count - overlap), size - overlap)
    return [range(start, min(start + size, count)) for start in starts]


def join_window(new: Sequence[WindowView], placed: Sequence[WindowView]) -> Similarity:
    """The similarity from the world of `new` to that of `placed`; both are of the same photos, in the same order.

    Raises:
        ValueError: the photos have no pixel whose depth both know.
    """
    pairs = [_log_ratios(a, b) for a, b in zip(new, placed, strict=True)]
    ratios, weights = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if not len(ratios):
        raise ValueError(
            "two windows of photos share no pixel that both have a depth for: give a larger data.overlap, or "
            "data.max_views so large that one window holds all photos"
        )
    scale = _weighted_median(ratios, weights).exp()
    from_new, to_placed = (invert_se3(torch.stack([view.world_to_camera for view in views])) for views in (new, placed))
    rotation = nearest_rotation(multiply(to_placed[..., :3], from_new[..., :3].mT).mean(0))
    centers = to_placed[..., 3] - scale * rotate(rotation, from_new[..., 3])
    return Similarity(scale, rotation, centers.median(0).values)


def place_view(view: WindowView, similarity: Similarity) -> WindowView:
    """A view in the other world; its depth takes the other unit."""
    camera_to_world = similarity.apply_to_cameras(invert_se3(view.world_to_camera)[None])[0]
    depth = view.depth * similarity.scale
    return view._replace(world_to_camera=invert_se3(camera_to_world), depth=depth)


def _log_ratios(new: WindowView, placed: WindowView) -> tuple[Tensor, Tensor]:
    """ln(placed depth / new depth) [N] in pixels that both crops show and know the depth of, and its weights [N]."""
    low = torch.maximum(new.crop_box[:2], placed.crop_box[:2])
    high = torch.minimum(new.crop_box[2:], placed.crop_box[2:])
    steps = (torch.arange(_GRID) + 0.5) / _GRID
    x, y = (low[axis] + (high[axis] - low[axis]) * steps for axis in (0, 1))
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
    (depth, sure), (placed_depth, placed_sure) = _at(new, pixels), _at(placed, pixels)
    weights = (sure * placed_sure).sqrt()
    known = (depth > 0) & (placed_depth > 0) & depth.isfinite() & placed_depth.isfinite() & (weights > 0)
    return (placed_depth[known] / depth[known]).log(), weights[known]


def _at(view: WindowView, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Depth and confidence [N] at pixels [N, 2] of the photo."""
    rows, columns = view.depth.shape
    share = (pixels - view.crop_box[:2]) / (view.crop_box[2:] - view.crop_box[:2])
    column, row = (share * share.new_tensor([columns, rows])).floor().long().unbind(-1)
    column, row = column.clamp(0, columns - 1), row.clamp(0, rows - 1)
    depth = view.depth[row, column]
    return depth, torch.ones_like(depth) if view.confidence is None else view.confidence[row, column]


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    order = values.argsort()
    share = weights[order].cumsum(0)
    return values[order[int((share < share[-1] / 2).sum())]]
