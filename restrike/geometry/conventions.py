"""The conventions of every camera, point and depth in Restrike, said once.

Axes        OpenCV: x right, y down, z forward, right-handed, for cameras and for image coordinates.
Vectors     Columns: X_camera = R X_world + t.
Cameras     `world_to_camera` [..., 3, 4] = [R | t]; its inverse is `camera_to_world`. Never 4x4 (`homogeneous` where
            another library wants one).
Intrinsics  `intrinsics` [..., 3, 3] in pixels, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], no skew, no distortion.
Pixels      (u, v) = (column, row). The image's upper left corner is (0, 0), so the centre of its first pixel is
            (PIXEL_CENTER, PIXEL_CENTER) = (0.5, 0.5) and its centre (W/2, H/2), as in CO3D and COLMAP. VGGT and CUT3R
            put the first pixel's centre at 0 (OPENCV_PIXEL_CENTER): their borders pass `pixel_center=`, or move the
            principal point with `conversions.shift_pixel_center`.
Depth       `depth` is z-depth in scene units, 0 where unknown (CUT3R's sky: negative). `ray_distance` is the length
            along the ray.
Units       Scene units: metres where the data has them. Angles in radians.
Shapes      Leading dimensions are free and batched. A function of a camera [*lead, 3, 4] and points [*lead, *any, 3]
            aligns the two from the left, so one camera serves a whole image without `unsqueeze`.

A family that was trained in other axes (DiffusionSfM: PyTorch3D) converts at its border with `conversions.py`. The
functions that only need z forward (projection, rays, recovery of cameras) then serve in its axes and units too.

Everything here runs in float32 at least, whatever autocast says (`full_precision`), and 3x3 products avoid matmul, so
that TF32, which keeps 10 bits of a number, never touches a coordinate.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

PIXEL_CENTER = 0.5
OPENCV_PIXEL_CENTER = 0.0

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` without autocast, its half-precision tensor arguments widened to float32."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with _no_autocast([*args, *kwargs.values()]):
            return function(*map(_widen, args), **{key: _widen(value) for key, value in kwargs.items()})  # type: ignore[arg-type]

    return wrapper


def _no_autocast(arguments: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    kind = next((x.device.type for x in arguments if isinstance(x, Tensor)), "cpu")
    kind = "cpu" if kind == "meta" else kind  # where `restrike.plan` keeps the state of the autocast that it imitates
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def _widen(x: Any) -> Any:
    is_narrow = isinstance(x, Tensor) and x.is_floating_point() and x.element_size() < 4
    return x.float() if is_narrow else x


def check_trailing(name: str, tensor: Tensor, *trailing: int) -> None:
    """Raise unless the last dimensions are `trailing`.

    Raises:
        ValueError: names the argument, the shape expected and the one that came.
    """
    if tuple(tensor.shape[-len(trailing) :]) != trailing:
        wanted = ", ".join(map(str, trailing))
        raise ValueError(f"{name}: expected shape [..., {wanted}], got {list(tensor.shape)}")
