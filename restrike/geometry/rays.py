"""Images as bundles of rays: what DiffusionSfM and CUT3R feed to their networks.

DiffusionSfM (arXiv 2505.05473) describes each patch by its ray's origin (the camera centre) and endpoint (the surface
point), both as unit homogeneous 4-vectors; its ancestor RayDiffusion by direction and moment (Plücker). CUT3R's ray
map holds the camera centre and, by an oversight that its weights have learnt, a normalised point, not a direction.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from restrike.geometry.cameras import camera_centers, compose_se3, invert_se3
from restrike.geometry.conventions import PIXEL_CENTER, check_trailing, full_precision
from restrike.geometry.projection import image_rays, pixel_grid, unproject, unproject_depth
from restrike.geometry.rotations import multiply, rotate

_HOMOGENEOUS_EPS = 1e-6


@full_precision
def pixel_rays(
    intrinsics: Tensor,
    camera_to_world: Tensor,
    image_size: tuple[int, int],
    pixel_center: float = PIXEL_CENTER,
    unit: bool = True,
) -> tuple[Tensor, Tensor]:
    """Ray of every pixel in the world.

    Args:
        intrinsics: [..., 3, 3], pixels.
        camera_to_world: [..., 3, 4].
        image_size: (H, W).
        pixel_center: Coordinate of the first pixel's centre.
        unit: False leaves directions with z = 1 in the camera: the point is origin + depth · direction.

    Returns:
        ray_origins and ray_directions, each [..., H, W, 3].
    """
    check_trailing("camera_to_world", camera_to_world, 3, 4)
    grid = pixel_grid(*image_size, pixel_center=pixel_center, device=intrinsics.device, dtype=intrinsics.dtype)
    directions = image_rays(grid.expand(*intrinsics.shape[:-2], *grid.shape), intrinsics)
    directions = rotate(camera_to_world[..., :3], directions)
    if unit:
        directions = F.normalize(directions, dim=-1)
    return camera_to_world[..., None, None, :, 3].expand_as(directions), directions


def ray_moments(ray_origins: Tensor, ray_directions: Tensor) -> Tensor:
    """Plücker moments origin × direction, [..., 3]: the same for every point of the ray taken as origin."""
    return torch.linalg.cross(ray_origins, ray_directions)


@full_precision
def ray_origins_and_endpoints(
    coords: Tensor, depth: Tensor, intrinsics: Tensor, world_to_camera: Tensor
) -> tuple[Tensor, Tensor]:
    """DiffusionSfM's rays of patches, in whichever axes and units the cameras and coordinates share.

    Args:
        coords: [..., P, P, 2], patch centres (NDC for DiffusionSfM: `crops.patch_centers`).
        depth: [..., P, P], z-depth.
        intrinsics: [..., 3, 3], in the unit of `coords`.
        world_to_camera: [..., 3, 4].

    Returns:
        ray_origins and ray_endpoints, each [..., P, P, 3].
    """
    endpoints = unproject(coords, depth, intrinsics, invert_se3(world_to_camera))
    return camera_centers(world_to_camera)[..., None, None, :].expand_as(endpoints), endpoints


@full_precision
def encode_rays(ray_origins: Tensor, ray_endpoints: Tensor) -> Tensor:
    """Map [..., 8, P, P] of origins and endpoints [..., P, P, 3]: unit (origin, 1), then unit (endpoint, 1)."""
    vectors = [F.normalize(F.pad(x, (0, 1), value=1.0), dim=-1) for x in (ray_origins, ray_endpoints)]
    return rearrange(torch.cat(vectors, dim=-1), "... h w c -> ... c h w")


@full_precision
def decode_rays(ray_map: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `encode_rays`: [..., 8, P, P] of any scale to origins and endpoints [..., P, P, 3].

    Division by w + 1e-6, as published; w has no sign rule.
    """
    vectors = rearrange(ray_map, "... (k c) h w -> k ... h w c", k=2, c=4)
    points = vectors[..., :3] / (vectors[..., 3:] + _HOMOGENEOUS_EPS)
    return points[0], points[1]


@full_precision
def cut3r_ray_map(
    intrinsics: Tensor,
    camera_to_world: Tensor,
    reference_to_world: Tensor,
    image_size: tuple[int, int],
    pixel_center: float = PIXEL_CENTER,
    add_translation: bool = True,
) -> Tensor:
    """CUT3R's input for a view without an image: its camera as seen from the reference view.

    Args:
        intrinsics: [..., 3, 3], pixels.
        camera_to_world: [..., 3, 4].
        reference_to_world: [..., 3, 4], camera of the first view.
        image_size: (H, W).
        pixel_center: Coordinate of the first pixel's centre (CUT3R: 0).
        add_translation: True: the last three channels are normalise(R K⁻¹ (u, v, 1) + t), a point: the released weights
            expect it. False: the direction that was meant.

    Returns:
        [..., H, W, 6]: camera centre, then point or direction.
    """
    camera_to_reference = compose_se3(invert_se3(reference_to_world), camera_to_world)
    origins, directions = pixel_rays(intrinsics, camera_to_reference, image_size, pixel_center, unit=False)
    last = directions + origins if add_translation else directions
    return torch.cat([origins, F.normalize(last, dim=-1)], dim=-1)


@full_precision
def intersect_rays(ray_origins: Tensor, ray_directions: Tensor, weights: Tensor | None = None) -> Tensor:
    """Point nearest to a bundle of rays in the least-squares sense: Σ (1 - d dᵀ) C = Σ (1 - d dᵀ) o.

    Args:
        ray_origins: [..., N, 3].
        ray_directions: [..., N, 3], of any length.
        weights: [..., N].

    Returns:
        [..., 3]; for parallel rays, the one nearest to the world's origin. Solved in float64: a narrow bundle fixes
        the distance badly.
    """
    origins, directions = ray_origins.double(), F.normalize(ray_directions.double(), dim=-1)
    across = torch.eye(3).to(directions) - directions[..., :, None] * directions[..., None, :]
    if weights is not None:
        across = across * weights[..., None, None]
    right = multiply(across, origins[..., None]).sum(-3)
    # NaN returns through `right`; in the system it would raise for the whole batch.
    system = torch.nan_to_num(across.sum(-3), nan=0.0, posinf=0.0, neginf=0.0)
    center = multiply(torch.linalg.pinv(system, hermitian=True), right)[..., 0]
    return center.to(ray_origins.dtype)


@full_precision
def points_along_rays(ray_origins: Tensor, ray_directions: Tensor, ray_distance: Tensor) -> Tensor:
    """origin + ray_distance · unit direction, [..., 3], from [..., 3], [..., 3] and [...]."""
    return ray_origins + F.normalize(ray_directions, dim=-1) * ray_distance[..., None]


def depth_to_ray_distance(depth: Tensor, intrinsics: Tensor, pixel_center: float = PIXEL_CENTER) -> Tensor:
    """Length along the ray of z-depth [..., H, W] under intrinsics [..., 3, 3] in pixels."""
    return unproject_depth(depth, intrinsics, pixel_center=pixel_center).norm(dim=-1)
