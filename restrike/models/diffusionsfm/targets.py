"""What DiffusionSfM learns, computed from cameras and depth on their device (arXiv 2505.05473, section 3).

The family's border: OpenCV cameras in pixels come in; maps and coordinates in PyTorch3D's axes (x left, y up) and
isotropic NDC of the *whole* picture leave. Always float32, outside autocast: the release computes this in bf16, which
is off by 0.4 %.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from restrike.geometry import (
    crop_intrinsics,
    crop_parameters,
    encode_rays,
    full_precision,
    make_intrinsics,
    make_se3,
    normalize_to_first_view_median,
    patch_centers,
    ray_origins_and_endpoints,
    resize_intrinsics,
    to_pytorch3d,
)


class ViewCameras(NamedTuple):
    """Cameras of crops as the data layer has them; see `restrike.data.samples.MultiViewSample`.

    Attributes:
        world_to_camera: [..., V, 3, 4].
        intrinsics: [..., V, 3, 3], pixels of the crop, resized.
        crop_boxes: [..., V, 4], (left, top, right, bottom) in pixels of the whole picture.
        source_sizes: [..., V, 2], (H, W) of the whole picture.
        image_size: Side of the crop, resized.
    """

    world_to_camera: Tensor
    intrinsics: Tensor
    crop_boxes: Tensor
    source_sizes: Tensor
    image_size: int


class RayTargets(NamedTuple):
    """rays: [..., V, 8, P, P], x₀; world_to_camera: [..., V, 3, 4] and `scale` [...], of the normalised scene."""

    rays: Tensor
    world_to_camera: Tensor
    scale: Tensor


def ndc_coordinates(crop_boxes: Tensor, source_sizes: Tensor, patches: int) -> Tensor:
    """NDC (x, y) of the patch centres of crops: [..., 2, patches, patches] from [..., 4] and [..., 2] (H, W)."""
    return patch_centers(crop_parameters(crop_boxes, source_sizes), patches).movedim(-1, -3).float()


@full_precision
def to_ndc_cameras(cameras: ViewCameras) -> tuple[Tensor, Tensor]:
    """world_to_camera [..., V, 3, 4] in PyTorch3D's axes (column vectors) and intrinsics [..., V, 3, 3] in NDC."""
    boxes = cameras.crop_boxes
    zoom = (boxes[..., 2] - boxes[..., 0]) / cameras.image_size
    whole = crop_intrinsics(resize_intrinsics(cameras.intrinsics, zoom, zoom), -boxes[..., 0], -boxes[..., 1])
    rotation, translation, focal, principal_point = to_pytorch3d(cameras.world_to_camera, whole, cameras.source_sizes)
    return make_se3(rotation.mT, translation), make_intrinsics(focal, principal_point)


@full_precision
def ray_targets(cameras: ViewCameras, depth: Tensor) -> RayTargets:
    """Clean rays of scenes.

    Args:
        cameras: Of the views; the first is the world.
        depth: [..., V, P, P], z-depth on the map's grid, holes filled.

    Returns:
        RayTargets; unit length is the first camera's distance from the median of its own points.
    """
    world_to_camera, intrinsics = to_ndc_cameras(cameras)
    coords = patch_centers(crop_parameters(cameras.crop_boxes, cameras.source_sizes), depth.shape[-1]).to(depth.dtype)
    scene = normalize_to_first_view_median(world_to_camera, depth, intrinsics, coords)
    rays = encode_rays(*ray_origins_and_endpoints(coords, scene.depth, intrinsics, scene.world_to_camera))
    return RayTargets(torch.nan_to_num(rays), scene.world_to_camera, scene.scale)
