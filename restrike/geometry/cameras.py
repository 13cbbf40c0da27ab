"""Cameras: rigid transforms [..., 3, 4], centres, pinhole intrinsics and fields of view."""

from __future__ import annotations

import torch
from torch import Tensor

from restrike.geometry.conventions import check_trailing, full_precision
from restrike.geometry.rotations import align_left, multiply, rotate

_ROTATION_TOLERANCE = 0.01  # |det R - 1| and |R Rᵀ - 1|; CO3D's bad sequences are far beyond, float16 files within


@full_precision
def make_se3(rotation: Tensor, translation: Tensor) -> Tensor:
    """[R | t], [..., 3, 4], from [..., 3, 3] and [..., 3]."""
    check_trailing("rotation", rotation, 3, 3)
    check_trailing("translation", translation, 3)
    return torch.cat([rotation, translation[..., None]], dim=-1)


def homogeneous(transform: Tensor) -> Tensor:
    """[..., 4, 4] from [..., 3, 4]: the row (0, 0, 0, 1) added."""
    check_trailing("transform", transform, 3, 4)
    last = transform.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*transform.shape[:-2], 1, 4)
    return torch.cat([transform, last], dim=-2)


@full_precision
def invert_se3(transform: Tensor) -> Tensor:
    """Inverse [Rᵀ | -Rᵀ t] of rigid transforms [..., 3, 4]: world_to_camera to camera_to_world and back."""
    check_trailing("transform", transform, 3, 4)
    inverse_rotation = transform[..., :3].mT
    return make_se3(inverse_rotation, -rotate(inverse_rotation, transform[..., 3]))


@full_precision
def compose_se3(outer: Tensor, inner: Tensor) -> Tensor:
    """outer ∘ inner, all [..., 3, 4] and broadcast: first `inner`, then `outer`."""
    check_trailing("outer", outer, 3, 4)
    check_trailing("inner", inner, 3, 4)
    rotation = multiply(outer[..., :3], inner[..., :3])
    translation = multiply(outer[..., :3], inner[..., 3:]) + outer[..., 3:]
    return torch.cat([rotation, translation], dim=-1)


@full_precision
def transform_points(transform: Tensor, points: Tensor) -> Tensor:
    """R X + t.

    Args:
        transform: [*lead, 3, 4].
        points: [*lead, *any, 3].

    Returns:
        [*lead, *any, 3].
    """
    check_trailing("transform", transform, 3, 4)
    return rotate(transform[..., :3], points) + align_left(transform, points)[..., 3]


@full_precision
def camera_centers(world_to_camera: Tensor) -> Tensor:
    """Camera centres -Rᵀ t in the world, [..., 3]."""
    check_trailing("world_to_camera", world_to_camera, 3, 4)
    return -rotate(world_to_camera[..., :3].mT, world_to_camera[..., 3])


@full_precision
def to_first_camera(world_to_camera: Tensor) -> Tensor:
    """Cameras [..., V, 3, 4] with the first view's camera as the world: E_v E_0⁻¹."""
    return compose_se3(world_to_camera, invert_se3(world_to_camera[..., :1, :, :]))


@full_precision
def make_intrinsics(focal: Tensor, principal_point: Tensor) -> Tensor:
    """Intrinsics [..., 3, 3] from focal lengths and principal point, each [..., 2] (x, y), in one unit."""
    check_trailing("focal", focal, 2)
    check_trailing("principal_point", principal_point, 2)
    focal, principal_point = torch.broadcast_tensors(focal, principal_point)
    last = torch.zeros_like(focal[..., :1]).expand(*focal.shape[:-1], 3).clone()
    last[..., 2] = 1
    upper = torch.cat([torch.diag_embed(focal), principal_point[..., None]], dim=-1)
    return torch.cat([upper, last[..., None, :]], dim=-2)


def split_intrinsics(intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Focal lengths and principal point, each [..., 2] (x, y), of intrinsics [..., 3, 3]."""
    check_trailing("intrinsics", intrinsics, 3, 3)
    return torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], dim=-1), intrinsics[..., :2, 2]


@full_precision
def intrinsics_to_fov(intrinsics: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Field of view (height, width) in radians, [..., 2], as if the principal point were central.

    Args:
        intrinsics: [..., 3, 3], pixels.
        image_size: (H, W).
    """
    height, width = image_size
    focal, _ = split_intrinsics(intrinsics)
    return torch.stack([2 * torch.atan(height / 2 / focal[..., 1]), 2 * torch.atan(width / 2 / focal[..., 0])], dim=-1)


@full_precision
def fov_to_intrinsics(fov: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Intrinsics [..., 3, 3] in pixels, principal point (W/2, H/2), from fields of view (height, width) [..., 2]."""
    check_trailing("fov", fov, 2)
    height, width = image_size
    focal = torch.stack([width / 2 / torch.tan(fov[..., 1] / 2), height / 2 / torch.tan(fov[..., 0] / 2)], dim=-1)
    return make_intrinsics(focal, focal.new_tensor([width / 2, height / 2]))


def check_cameras(world_to_camera: Tensor, intrinsics: Tensor, source: str = "cameras") -> None:
    """Refuse cameras that no renderer could have had; reads the values, so call it in data code, not in a step.

    Args:
        world_to_camera: [..., 3, 4].
        intrinsics: [..., 3, 3], pixels.
        source: What the message names: a file, a sequence.

    Raises:
        ValueError: with the first bad index: not finite, a rotation that is none, a focal length that is not positive.
    """
    check_trailing("world_to_camera", world_to_camera, 3, 4)
    check_trailing("intrinsics", intrinsics, 3, 3)
    rotation = world_to_camera[..., :3].double()
    deviation = (multiply(rotation, rotation.mT) - torch.eye(3, dtype=torch.float64, device=rotation.device)).abs()
    determinant = torch.linalg.det(rotation.nan_to_num())
    focal, _ = split_intrinsics(intrinsics)
    problems = {
        "a value that is not finite": ~(world_to_camera.isfinite().all((-1, -2)) & intrinsics.isfinite().all((-1, -2))),
        "R that is no rotation (det R = 1 and R Rᵀ = 1 expected)": (deviation.amax((-1, -2)) > _ROTATION_TOLERANCE)
        | ((determinant - 1).abs() > _ROTATION_TOLERANCE),
        "a focal length that is not positive": (focal <= 0).any(-1),
    }
    for what, is_bad in problems.items():
        if is_bad.any():
            index = is_bad.nonzero()[0].tolist()
            raise ValueError(f"{source}: camera {index} has {what}; drop the frame or mend its annotation")
