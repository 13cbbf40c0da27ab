"""Cameras as vectors that a network predicts: VGGT's nine numbers and CUT3R's seven.

They differ in everything: VGGT encodes world_to_camera, quaternion scalar last, then fields of view (height, width);
CUT3R encodes camera_to_world, quaternion scalar first, no intrinsics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from restrike.geometry.cameras import fov_to_intrinsics, intrinsics_to_fov, make_se3
from restrike.geometry.conventions import check_trailing, full_precision
from restrike.geometry.rotations import (
    matrix_to_quaternion,
    quaternion_conjugate,
    quaternion_multiply,
    quaternion_to_matrix,
    rotate,
)


@full_precision
def encode_pose_fov(world_to_camera: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> Tensor:
    """VGGT's "absT_quaR_FoV" (arXiv 2503.11651, section 3.1): (tx, ty, tz, qx, qy, qz, qw, fov_h, fov_w).

    Args:
        world_to_camera: [..., 3, 4].
        intrinsics: [..., 3, 3], pixels; the principal point is not encoded.
        image_size: (H, W).

    Returns:
        [..., 9], quaternion with w ≥ 0, angles in radians.
    """
    check_trailing("world_to_camera", world_to_camera, 3, 4)
    quaternion = matrix_to_quaternion(world_to_camera[..., :3], "xyzw")
    return torch.cat([world_to_camera[..., 3], quaternion, intrinsics_to_fov(intrinsics, image_size)], dim=-1)


@full_precision
def decode_pose_fov(encoding: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`world_to_camera` [..., 3, 4] and `intrinsics` [..., 3, 3] of VGGT's encoding [..., 9].

    The quaternion may have any length; the principal point becomes (W/2, H/2).
    """
    check_trailing("encoding", encoding, 9)
    translation, quaternion, fov = encoding.split([3, 4, 2], dim=-1)
    return make_se3(quaternion_to_matrix(quaternion, "xyzw"), translation), fov_to_intrinsics(fov, image_size)


@full_precision
def encode_pose(camera_to_world: Tensor) -> Tensor:
    """CUT3R's camera vector (arXiv 2501.12387): translation, then quaternion (w, x, y, z) with w ≥ 0; [..., 7]."""
    check_trailing("camera_to_world", camera_to_world, 3, 4)
    return torch.cat([camera_to_world[..., 3], matrix_to_quaternion(camera_to_world[..., :3], "wxyz")], dim=-1)


@full_precision
def decode_pose(encoding: Tensor) -> Tensor:
    """`camera_to_world` [..., 3, 4] of CUT3R's encoding [..., 7]; the quaternion may have any length."""
    check_trailing("encoding", encoding, 7)
    return make_se3(quaternion_to_matrix(encoding[..., 3:], "wxyz"), encoding[..., :3])


@full_precision
def relative_pose_encoding(reference: Tensor, encoding: Tensor) -> Tensor:
    """CUT3R's pose `encoding` as seen from the pose `reference`, both [..., 7] with unit quaternions.

    The quaternion's sign stays as the product gives it.
    """
    check_trailing("reference", reference, 7)
    check_trailing("encoding", encoding, 7)
    inverse = quaternion_conjugate(reference[..., 3:], "wxyz")
    translation = rotate(quaternion_to_matrix(inverse, "wxyz"), encoding[..., :3] - reference[..., :3])
    return torch.cat([translation, quaternion_multiply(inverse, encoding[..., 3:], "wxyz")], dim=-1)
