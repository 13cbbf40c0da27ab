"""Pixels to points and back; the focal length that a map of points implies.

Only z forward is assumed, so the same functions serve pixels in OpenCV axes and NDC in PyTorch3D's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from restrike.geometry.cameras import transform_points
from restrike.geometry.conventions import PIXEL_CENTER, check_trailing, full_precision
from restrike.geometry.rotations import align_left, rotate

_MIN_DEPTH = 1e-8


def pixel_grid(
    height: int,
    width: int,
    pixel_center: float = PIXEL_CENTER,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Pixel centres (u, v), [H, W, 2]; the first one is (pixel_center, pixel_center)."""
    v = torch.arange(height, device=device, dtype=dtype) + pixel_center
    u = torch.arange(width, device=device, dtype=dtype) + pixel_center
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)


@full_precision
def image_rays(coords: Tensor, intrinsics: Tensor) -> Tensor:
    """Rays K⁻¹ (u, v, 1) with z = 1 in the camera, so that depth times ray is the point.

    Args:
        coords: [*lead, *any, 2], or [*any, 2] shared by all cameras when `lead` is longer than its dimensions allow.
        intrinsics: [*lead, 3, 3], in the unit of `coords`.

    Returns:
        [*lead, *any, 3].
    """
    check_trailing("coords", coords, 2)
    check_trailing("intrinsics", intrinsics, 3, 3)
    k = align_left(intrinsics, coords)
    xy = (coords - k[..., :2, 2]) / torch.stack([k[..., 0, 0], k[..., 1, 1]], dim=-1)
    return torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1)


@full_precision
def unproject(coords: Tensor, depth: Tensor, intrinsics: Tensor, camera_to_world: Tensor | None = None) -> Tensor:
    """Points of image coordinates at given z-depths.

    Args:
        coords: [*any, 2] for all cameras, or [*lead, *any, 2].
        depth: [*lead, *any], 0 where unknown.
        intrinsics: [*lead, 3, 3], in the unit of `coords`.
        camera_to_world: [*lead, 3, 4]; None leaves the points in the camera.

    Returns:
        [*lead, *any, 3]; the camera's centre where depth is 0, so mask by `depth > 0`.
    """
    points = image_rays(coords.expand(*depth.shape, 2), intrinsics) * depth[..., None]
    return points if camera_to_world is None else transform_points(camera_to_world, points)


@full_precision
def unproject_depth(
    depth: Tensor, intrinsics: Tensor, camera_to_world: Tensor | None = None, pixel_center: float = PIXEL_CENTER
) -> Tensor:
    """Lift a map of z-depth to points.

    Args:
        depth: [..., H, W], scene units, 0 where unknown.
        intrinsics: [..., 3, 3], pixels.
        camera_to_world: [..., 3, 4], OpenCV axes; None gives points in the camera.
        pixel_center: Coordinate of the first pixel's centre.

    Returns:
        [..., H, W, 3]; the camera's centre where depth is 0, so mask by `depth > 0`.
    """
    check_trailing("intrinsics", intrinsics, 3, 3)
    height, width = depth.shape[-2:]
    u, v = (torch.arange(side, device=depth.device, dtype=depth.dtype) + pixel_center for side in (width, height))
    x = (u - intrinsics[..., 0, 2, None]) / intrinsics[..., 0, 0, None]
    y = (v - intrinsics[..., 1, 2, None]) / intrinsics[..., 1, 1, None]
    if camera_to_world is None:
        axes = torch.eye(3, device=depth.device, dtype=depth.dtype)
    else:
        check_trailing("camera_to_world", camera_to_world, 3, 4)
        axes = camera_to_world[..., :3]
    # A ray is a sum over columns and rows: two passes over the pixels instead of the ten of `unproject`.
    across = axes[..., None, :, 0] * x[..., None]
    down = axes[..., None, :, 1] * y[..., None] + axes[..., None, :, 2]
    rays = down[..., :, None, :] + across[..., None, :, :]
    if camera_to_world is None:
        return rays * depth[..., None]
    return torch.addcmul(camera_to_world[..., None, None, :, 3], rays, depth[..., None])


@full_precision
def project_points(points: Tensor, intrinsics: Tensor, world_to_camera: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Image coordinates and z-depth of points.

    Args:
        points: [*lead, *any, 3], world (or camera, without `world_to_camera`).
        intrinsics: [*lead, 3, 3]; their unit is the result's.
        world_to_camera: [*lead, 3, 4].

    Returns:
        Coordinates [*lead, *any, 2] and depth [*lead, *any]. Depth ≤ 0 is behind the camera: coordinates mean nothing
        there, but stay finite, so that gradients do.
    """
    if world_to_camera is not None:
        points = transform_points(world_to_camera, points)
    depth = points[..., 2]
    safe = torch.where(depth.abs() < _MIN_DEPTH, torch.full_like(depth, _MIN_DEPTH), depth)
    projected = rotate(intrinsics, points / safe[..., None])
    return projected[..., :2], depth


@full_precision
def focal_from_points(
    points_camera: Tensor,
    principal_point: Tensor,
    method: Literal["weiszfeld", "median"] = "weiszfeld",
    pixel_center: float = PIXEL_CENTER,
    iterations: int = 10,
) -> Tensor:
    """Focal length for which a map of camera points projects to its own pixels (DUSt3R, section 3.3).

    Args:
        points_camera: [..., H, W, 3].
        principal_point: [..., 2], pixels.
        method: "weiszfeld" (CUT3R's evaluation) minimises the sum of reprojection distances by `iterations` reweighted
            least squares; "median" takes the median of the focal lengths of all pixels and both axes.
        pixel_center: Coordinate of the first pixel's centre.

    Returns:
        [...], pixels.
    """
    check_trailing("points_camera", points_camera, 3)
    height, width = points_camera.shape[-3:-1]
    grid = pixel_grid(height, width, pixel_center, points_camera.device, points_camera.dtype)
    pixels = (grid - principal_point[..., None, None, :]).flatten(-3, -2)
    points = points_camera.flatten(-3, -2)
    if method == "median":
        return (pixels * points[..., 2:] / points[..., :2]).flatten(-2).nanmedian(dim=-1).values
    if method != "weiszfeld":
        raise ValueError(f"method: expected 'weiszfeld' or 'median', got {method!r}")
    rays = (points[..., :2] / points[..., 2:]).nan_to_num(posinf=0, neginf=0)
    pixel_dot_ray, ray_square = (pixels * rays).sum(-1), rays.square().sum(-1)
    focal = pixel_dot_ray.mean(-1) / ray_square.mean(-1)
    for _ in range(iterations):
        distance = (pixels - focal[..., None, None] * rays).norm(dim=-1)
        weights = 1 / distance.clamp(min=1e-8)
        focal = (weights * pixel_dot_ray).mean(-1) / (weights * ray_square).mean(-1)
    return focal
