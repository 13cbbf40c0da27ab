"""Pictures of rays: endpoints and origins as colours, beside the images they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from restrike.geometry import decode_rays

if TYPE_CHECKING:
    from PIL import Image

_GAP = 4
_NEAREST_W = 0.05  # a homogeneous coordinate nearer to 0 is a point too far to be shown


def ray_sheet(images: Tensor, predicted: Tensor, true: Tensor, tile: int = 96) -> Image.Image:
    """One column a view; rows: image, predicted and true endpoints, predicted and true origins.

    Args:
        images: uint8 [V, 3, H, W].
        predicted: [V, 8, P, P].
        true: [V, 8, P, P]; its range of coordinates is what both are coloured by, x red, y green, z blue.
        tile: Side of a picture, pixels.
    """
    from PIL import Image

    rows = [_fit(images.float() / 255, tile, "bilinear")]
    pairs = list(zip(_points(predicted), _points(true), strict=True))
    for guess, truth in reversed(pairs):  # endpoints first
        low, high = truth.amin((0, 2, 3), keepdim=True), truth.amax((0, 2, 3), keepdim=True)
        span = (high - low).clamp(min=1e-6)
        rows += [_fit(((x - low) / span).clamp(0, 1), tile, "nearest") for x in (guess, truth)]
    sheet = torch.cat([F.pad(row, (0, _GAP, 0, _GAP), value=1.0) for row in rows], dim=2)  # [V, 3, rows, tile]
    pixels = (torch.cat(list(sheet), dim=2) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def _points(rays: Tensor) -> tuple[Tensor, Tensor]:
    """Origins and endpoints [V, 3, P, P]; what lies at infinity is put far, not nowhere."""
    vectors = rays.float().unflatten(1, (2, 4))
    w = vectors[:, :, 3:]
    near = torch.where(w.abs() < _NEAREST_W, torch.where(w < 0, -_NEAREST_W, _NEAREST_W), w)
    origins, endpoints = decode_rays(torch.cat([vectors[:, :, :3], near], dim=2).flatten(1, 2))
    return origins.movedim(-1, 1).nan_to_num(), endpoints.movedim(-1, 1).nan_to_num()


def _fit(x: Tensor, tile: int, mode: str) -> Tensor:
    antialias = mode == "bilinear"
    return F.interpolate(x.cpu(), (tile, tile), mode=mode, antialias=antialias).clamp(0, 1)
