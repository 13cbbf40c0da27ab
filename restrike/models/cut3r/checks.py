"""Arguments and inputs that do not fit, said early."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

RAY_CHANNELS = 6


def input_shape(images: Tensor | None, ray_maps: Tensor | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """(B, V) and (H, W) of the views."""
    if images is None and ray_maps is None:
        raise ValueError("expected images, ray_maps or both, got neither")
    if images is not None and (images.ndim != 5 or images.shape[2] != 3):
        raise ValueError(f"images: expected [B, V, 3, H, W], got {list(images.shape)}")
    if ray_maps is not None and (ray_maps.ndim != 5 or ray_maps.shape[-1] != RAY_CHANNELS):
        raise ValueError(f"ray_maps: expected [B, V, H, W, {RAY_CHANNELS}], got {list(ray_maps.shape)}")
    shapes = [(x.shape[:2], x.shape[-2:]) for x in (images,) if x is not None]
    shapes += [(x.shape[:2], x.shape[2:4]) for x in (ray_maps,) if x is not None]
    if shapes[0] != shapes[-1]:
        raise ValueError(f"images and ray_maps: expected one [B, V] and (H, W), got {shapes[0]} and {shapes[1]}")
    (batch, views), (height, width) = shapes[0]
    return (batch, views), (height, width)


def check_choices(
    head_type: str, state_pe: str, masked_ray_scope: str, dec_depth: int, dpt_out_channels: Sequence[int]
) -> None:
    if head_type not in ("linear", "dpt"):
        raise ValueError(f"head_type: expected linear or dpt, got {head_type!r}")
    if state_pe not in ("2d", "1d"):
        raise ValueError(f"state_pe: expected 2d or 1d, got {state_pe!r}")
    if masked_ray_scope not in ("batch", "scene"):
        raise ValueError(f"masked_ray_scope: expected batch or scene, got {masked_ray_scope!r}")
    if dec_depth < 2:
        raise ValueError(f"dec_depth: expected at least 2, for the heads read layers inside, got {dec_depth}")
    if len(dpt_out_channels) != 4:
        raise ValueError(f"dpt_out_channels: expected four widths, got {list(dpt_out_channels)}")


def check_widths(dim: int, heads: dict[str, int]) -> None:
    for name, number in heads.items():
        if dim % (4 * number):
            raise ValueError(f"a width of {dim} does not fit {name} = {number}: heads need multiples of 4 channels")
