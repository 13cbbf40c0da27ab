"""From a map of rays back to cameras: the border out of DiffusionSfM's axes and coordinates.

A view's rays fix nine numbers up to scale, and an error in the principal point looks like a rotation. Rays that a
half-trained network has blurred therefore come out with a principal point outside the picture, and a camera turned by
as much. No lens has that: such views are solved again with the principal point in the picture's middle.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from restrike.geometry import (
    DEFAULT_FOCAL,
    PyTorch3DCameras,
    RayCameras,
    cameras_from_rays,
    cameras_from_rays_known,
    cameras_from_rays_released,
    crop_parameters,
    decode_rays,
    from_pytorch3d,
    full_precision,
    make_intrinsics,
    patch_centers,
    to_pytorch3d,
)
from restrike.geometry.ray_cameras import Center

Solver = Literal["robust", "linear", "released"]

# Of real cameras, in NDC: half the short side is 1.
_MAX_PRINCIPAL_POINT, _MAX_ASPECT, _FOCALS = 0.25, 1.25, (0.5, 20.0)


@full_precision
def cameras_from_ray_map(
    rays: Tensor,
    crop_boxes: Tensor,
    source_sizes: Tensor,
    intrinsics: Tensor | None = None,
    solver: Solver = "robust",
    center: Center = "mean",
) -> RayCameras:
    """OpenCV cameras of views, each from its own rays.

    Args:
        rays: [..., 8, P, P], 4-vectors of any length.
        crop_boxes: [..., 4], the crops' (left, top, right, bottom) in pixels of their whole pictures.
        source_sizes: [..., 2], (H, W) of the whole pictures.
        intrinsics: [..., 3, 3] in pixels of the whole pictures, where they are known.
        solver: "robust" (default) and "linear" (one least-squares fit over all rays) find all intrinsics where they are
            plausible; "released" has the release's defects, see `restrike.geometry.cameras_from_rays_released`. Known
            intrinsics have one solver.
        center: Camera centre: "mean" of the origins, or "intersection" of the rays. "released" takes the mean.

    Returns:
        world_to_camera [..., 3, 4] in the world of the rays, and intrinsics [..., 3, 3] in pixels of the whole picture.
        NaN for a view whose rays are not finite.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver: expected one of {', '.join(get_args(Solver))}, got {solver!r}")
    coords = patch_centers(crop_parameters(crop_boxes, source_sizes), rays.shape[-1]).to(rays).flatten(-3, -2)
    origins, endpoints = (x.flatten(-3, -2) for x in decode_rays(rays))
    if intrinsics is not None:
        ndc = _to_ndc(intrinsics, source_sizes)
        found = cameras_from_rays_known(origins, endpoints, coords, ndc, center)
    elif solver == "released":
        found = cameras_from_rays_released(origins, endpoints, coords)
    else:
        found = cameras_from_rays(origins, endpoints, coords, center, is_robust=solver == "robust")
        found = _centered_where_implausible(found, origins, endpoints, coords, center)
    world_to_camera, ndc = found
    focal, principal_point = _split(ndc)
    rows = PyTorch3DCameras(world_to_camera[..., :3].mT, world_to_camera[..., 3], focal, principal_point)
    return RayCameras(*from_pytorch3d(rows, source_sizes))


def _centered_where_implausible(
    found: RayCameras, origins: Tensor, endpoints: Tensor, coords: Tensor, center: Center
) -> RayCameras:
    """Views whose intrinsics no camera has, again with one focal length and the principal point in the middle."""
    focal, principal_point = _split(found.intrinsics)
    ratio = focal[..., 0] / focal[..., 1]
    is_far = principal_point.abs().amax(-1) > _MAX_PRINCIPAL_POINT
    is_odd = (ratio > _MAX_ASPECT) | (ratio < 1 / _MAX_ASPECT) | (focal.amin(-1) < _FOCALS[0])
    implausible = (is_far | is_odd | (focal.amax(-1) > _FOCALS[1])) & endpoints.isfinite().all(-1).all(-1)
    if not bool(implausible.any()):
        return found
    rough, _ = _split(cameras_from_rays_released(origins, endpoints, coords).intrinsics)
    rough = rough.abs().log().mean(-1, keepdim=True).exp().nan_to_num(DEFAULT_FOCAL).clamp(*_FOCALS)
    assumed = make_intrinsics(rough.expand_as(focal), torch.zeros_like(focal))
    again = cameras_from_rays_known(origins, endpoints, coords, assumed, center)
    where = implausible[..., None, None]
    return RayCameras(*(torch.where(where, new, old) for new, old in zip(again, found, strict=True)))


def _split(intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    return intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2], intrinsics[..., :2, 2]


def _to_ndc(intrinsics: Tensor, source_sizes: Tensor) -> Tensor:
    nowhere = torch.eye(3, 4).to(intrinsics).expand(*intrinsics.shape[:-2], 3, 4)
    _, _, focal, principal_point = to_pytorch3d(nowhere, intrinsics, source_sizes)
    return make_intrinsics(focal, principal_point)
