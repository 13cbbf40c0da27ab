"""Crops and resizes of pictures, depth and masks: as the families' releases give them, computing only what is kept.

All three families resize a whole picture and then throw much of it away (VGGT's wide crop of an upright phone video
keeps a third). Here the kept box alone is resized.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from restrike.geometry import CropBox

_LANCZOS_REACH = 3  # kernel's half width in output pixels
_SLACK = 16  # output pixels more on each side, among which the bounds are chosen that float32 holds best


def cut(pixels: np.ndarray, box: CropBox) -> np.ndarray:
    """A box of an array [H, W, ...]; what lies outside is 0."""
    part = pixels[max(0, box.top) : max(0, box.top + box.height), max(0, box.left) : max(0, box.left + box.width)]
    return _padded(part, box)


def _padded(part: np.ndarray, box: CropBox) -> np.ndarray:
    if part.shape[:2] == (box.height, box.width):
        return part
    top, left = max(0, -box.top), max(0, -box.left)
    padded = np.zeros((box.height, box.width, *part.shape[2:]), dtype=part.dtype)
    padded[top : top + part.shape[0], left : left + part.shape[1]] = part
    return padded


def resize_picture(image: np.ndarray, size: tuple[int, int], box: CropBox | None = None) -> np.ndarray:
    """A box of a picture resized to (H, W): Lanczos where it shrinks, bicubic where it grows (Pillow, as VGGT's and
    CUT3R's releases).

    Args:
        image: uint8 [H', W', 3].
        size: of the whole result.
        box: of the result; beyond it is 0. None = all of it.

    Returns:
        uint8 [box.height, box.width, 3], equal to the box of the resized whole but for one level in about 1 of 30,000
        values: Pillow takes the bounds of a part as float32.
    """
    box = box or CropBox(0, 0, size[1], size[0])
    if image.shape[:2] == size:
        return cut(image, box)
    shrinks = size[0] < image.shape[0] or size[1] < image.shape[1]
    rows = _span(box.top, box.top + box.height, size[0], image.shape[0])
    columns = _span(box.left, box.left + box.width, size[1], image.shape[1])
    if rows is None or columns is None:
        return np.zeros((box.height, box.width, 3), dtype=np.uint8)
    (y, y_end, top, bottom, first, last), (x, x_end, left, right, start, stop) = rows, columns
    source = Image.fromarray(np.ascontiguousarray(image[first:last, start:stop]))
    kind = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    # Rows first, then columns, as every Pillow before 13 did; Pillow 13 chooses, and rounds in between.
    source = source.resize((x_end - x, last - first), kind, box=(left, 0, right, last - first))
    part = np.asarray(source.resize((x_end - x, y_end - y), kind, box=(0, top, x_end - x, bottom)))
    kept = CropBox(max(0, box.left), max(0, box.top), 0, 0)
    height, width = min(size[0], box.top + box.height) - kept.top, min(size[1], box.left + box.width) - kept.left
    return _padded(np.array(part[kept.top - y : kept.top - y + height, kept.left - x : kept.left - x + width]), box)


def _span(begin: int, end: int, size: int, length: int) -> tuple[int, int, float, float, int, int] | None:
    """One axis of a part of a resize of `length` pixels to `size`.

    Returns:
        Result pixels [a, b) around [begin, end), their bounds in source pixels counted from the next number, and
        source pixels [first, last) that hold all that the kernel reaches. None where nothing is inside.
    """
    begin, end = max(0, begin), min(size, end)
    if begin >= end:
        return None
    scale = length / size
    reach = math.ceil(_LANCZOS_REACH * max(scale, 1.0)) + 2
    first = max(0, math.floor((begin - _SLACK) * scale) - reach)
    last = min(length, math.ceil((end + _SLACK) * scale) + reach)
    starts = np.arange(max(0, begin - _SLACK), begin + 1)
    ends = np.arange(end, min(size, end + _SLACK) + 1)
    a, b = (int(bounds[np.argmin(_rounding(bounds * scale - first))]) for bounds in (starts, ends))
    return a, b, a * scale - first, b * scale - first, first, last


def _rounding(values: np.ndarray) -> np.ndarray:
    return np.abs(values.astype(np.float32) - values)


def resize_nearest(pixels: np.ndarray, size: tuple[int, int], box: CropBox | None = None) -> np.ndarray:
    """A box of an array [H', W'] resized to (H, W) as by OpenCV's INTER_NEAREST; beyond it is 0."""
    box = box or CropBox(0, 0, size[1], size[0])
    rows, columns = (
        np.minimum((np.arange(max(0, begin), min(new, begin + count)) * (1 / (new / old))).astype(int), old - 1)
        for begin, count, new, old in zip(box[1::-1], box[:1:-1], size, pixels.shape, strict=True)
    )
    return _padded(pixels.take(rows, 0).take(columns, 1), box)


def sample_nearest(pixels: np.ndarray, side: int, box: CropBox) -> np.ndarray:
    """A box of an array [H, W], 0 beyond it, to `side` pixels a side, each taken at its pixel's centre
    ("nearest-exact")."""
    rows, columns = (
        np.minimum(((np.arange(side) + 0.5) * length / side).astype(int), length - 1) + begin
        for begin, length in ((box.top, box.height), (box.left, box.width))
    )
    inside = ((rows >= 0) & (rows < pixels.shape[0]))[:, None] & (columns >= 0) & (columns < pixels.shape[1])
    taken = pixels[rows.clip(0, pixels.shape[0] - 1)[:, None], columns.clip(0, pixels.shape[1] - 1)]
    return np.where(inside, taken, 0).astype(pixels.dtype)


def drop_farthest(depth: np.ndarray, percentile: float) -> np.ndarray:
    """Depth [H, W] with 0 above its percentile (numpy's, linear); zeros count."""
    return depth if percentile >= 100 else np.where(depth > _percentile(depth, percentile), 0, depth)


def _percentile(values: np.ndarray, percentile: float) -> np.floating:
    """As `np.percentile`, where it is high: only the values above a guess from every 64th are looked through."""
    place = percentile / 100 * (values.size - 1)
    below = math.floor(place)
    sample = values[::8, ::8]
    guess = np.percentile(sample, max(0.0, percentile - 2), method="lower")
    candidates = values[values >= guess]
    rank = below - (values.size - candidates.size)
    if rank < 0 or rank + 1 >= candidates.size:
        return np.percentile(values, percentile)
    low, high = np.partition(candidates, [rank, rank + 1])[rank : rank + 2]
    share, step = np.float64(place - below), high - low
    return high - step * (1 - share) if share >= 0.5 else low + step * share


def fill_holes(depth: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Depth [P, Q] where every hole took the value of the nearest valid pixel; -1 everywhere if there is none.

    The exact feature transform, separably: the nearest valid row of each column, then the best column, sought no
    farther than the nearest valid pixel of the hole's own row or column lies.
    """
    if not valid.any():
        return np.full_like(depth, -1)
    if valid.all():
        return depth
    rows = _nearest_valid(valid)
    far = 4 * sum(depth.shape)
    down = np.where(valid.any(0), np.abs(rows - np.arange(len(depth))[:, None]), far)
    across = np.abs(_nearest_valid(valid.T).T - np.arange(depth.shape[1]))
    bound: np.ndarray = np.minimum(down, np.where(valid.any(1, keepdims=True), across, far))
    filled = depth.copy()
    y, x = np.nonzero(~valid)
    reach, least = 4, 0
    while least < depth.shape[1]:
        reach = min(reach, depth.shape[1])
        is_last = reach == depth.shape[1]
        now = (bound[y, x] > least) & (is_last | (bound[y, x] <= reach))
        _fill(filled, depth, rows, down, y[now], x[now], reach)
        reach, least = 4 * reach, reach
    return filled


def _fill(
    filled: np.ndarray, depth: np.ndarray, rows: np.ndarray, down: np.ndarray, y: np.ndarray, x: np.ndarray, reach: int
) -> None:
    """Holes (y, x) from the best column at most `reach` away."""
    steps = np.arange(-reach, reach + 1)
    columns = x[:, None] + steps
    outside = (columns < 0) | (columns >= depth.shape[1])
    columns = columns.clip(0, depth.shape[1] - 1)
    squared = down[y[:, None], columns] ** 2 + steps**2
    squared[outside] = np.iinfo(squared.dtype).max
    best = np.take_along_axis(columns, squared.argmin(1)[:, None], 1)[:, 0]
    filled[y, x] = depth[rows[y, best], best]


def _nearest_valid(valid: np.ndarray) -> np.ndarray:
    """The row of the nearest valid pixel of the same column, int64 [P, Q]; without meaning where there is none."""
    row = np.arange(len(valid))[:, None]
    far = 4 * sum(valid.shape)
    above = np.maximum.accumulate(np.where(valid, row, -far), axis=0)
    below = np.minimum.accumulate(np.where(valid, row, far)[::-1], axis=0)[::-1]
    return np.where(row - above <= below - row, above, below)
