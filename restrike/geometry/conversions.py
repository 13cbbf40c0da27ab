"""Cameras of other libraries, to and from Restrike's (OpenCV axes, pixels, corner origin): `conventions.py`.

PyTorch3D (CO3D, DiffusionSfM) multiplies row vectors, X_camera = X_world R + T, with axes x left, y up, z forward.
Its intrinsics are NDC: x grows left and y up from the image centre. `ndc_isotropic`: the short side spans [-1, 1];
`ndc_norm_image_bounds` (the default of old CO3D annotations): each side does. Formulae with (W - 1)/2, which circulate,
are half a pixel off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from restrike.geometry.cameras import make_intrinsics, make_se3, split_intrinsics
from restrike.geometry.conventions import check_trailing, full_precision
from restrike.geometry.rotations import matrix_to_quaternion, quaternion_to_matrix

NdcFormat = Literal["ndc_isotropic", "ndc_norm_image_bounds"]

_FLIP_XY = (-1.0, -1.0, 1.0)  # x right, y down <-> x left, y up
_FLIP_YZ = (1.0, -1.0, -1.0)  # y down, z forward <-> y up, z backward

# Names of the parameters of COLMAP's camera models, from its camera_models.h; after the pinhole ones, distortion.
_COLMAP_MODELS = {
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fx", "fy", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
}


class PyTorch3DCameras(NamedTuple):
    """R [..., 3, 3] and T [..., 3] for row vectors; focal_length and principal_point [..., 2] in NDC."""

    R: Tensor
    T: Tensor
    focal_length: Tensor
    principal_point: Tensor


@full_precision
def from_pytorch3d(
    cameras: PyTorch3DCameras, image_size: Tensor, intrinsics_format: NdcFormat = "ndc_isotropic"
) -> tuple[Tensor, Tensor]:
    """PyTorch3D cameras to `world_to_camera` [..., 3, 4] and `intrinsics` [..., 3, 3].

    Args:
        cameras: As annotated in CO3D.
        image_size: [..., 2] (H, W), broadcast against the cameras.
        intrinsics_format: What focal length and principal point are measured in.
    """
    world_to_camera = from_pytorch3d_pose(cameras.R, cameras.T)
    half, center = _ndc_units(image_size.to(cameras.focal_length), intrinsics_format)
    return world_to_camera, make_intrinsics(cameras.focal_length * half, center - cameras.principal_point * half)


@full_precision
def to_pytorch3d(
    world_to_camera: Tensor,
    intrinsics: Tensor,
    image_size: Tensor,
    intrinsics_format: NdcFormat = "ndc_isotropic",
) -> PyTorch3DCameras:
    """Inverse of `from_pytorch3d`: [..., 3, 4] and [..., 3, 3] in pixels to NDC of images of (H, W) [..., 2]."""
    rotation, translation = to_pytorch3d_pose(world_to_camera)
    focal, principal_point = split_intrinsics(intrinsics)
    half, center = _ndc_units(image_size.to(focal), intrinsics_format)
    return PyTorch3DCameras(rotation, translation, focal / half, (center - principal_point) / half)


@full_precision
def from_pytorch3d_pose(rotation: Tensor, translation: Tensor) -> Tensor:
    """R [..., 3, 3], T [..., 3] of row vectors to `world_to_camera` [..., 3, 4]: [D Rᵀ | D T], D = diag(-1, -1, 1)."""
    check_trailing("R", rotation, 3, 3)
    check_trailing("T", translation, 3)
    flip = rotation.new_tensor(_FLIP_XY)
    return make_se3(flip[:, None] * rotation.mT, flip * translation)


@full_precision
def to_pytorch3d_pose(world_to_camera: Tensor) -> tuple[Tensor, Tensor]:
    """`world_to_camera` [..., 3, 4] to R [..., 3, 3] and T [..., 3] of row vectors."""
    check_trailing("world_to_camera", world_to_camera, 3, 4)
    flip = world_to_camera.new_tensor(_FLIP_XY)
    return world_to_camera[..., :3].mT * flip, world_to_camera[..., 3] * flip


@full_precision
def from_opengl(camera_to_world: Tensor) -> Tensor:
    """`world_to_camera` [..., 3, 4] from OpenGL / Blender `camera_to_world` (x right, y up, z backward).

    So are the `transform_matrix` entries of a transforms.json; only the camera's axes turn, the world stays.
    """
    check_trailing("camera_to_world", camera_to_world, 3, 4)
    rotation = (camera_to_world[..., :3] * camera_to_world.new_tensor(_FLIP_YZ)).mT
    return make_se3(rotation, -(rotation * camera_to_world[..., None, :, 3]).sum(-1))


@full_precision
def to_opengl(world_to_camera: Tensor) -> Tensor:
    """Inverse of `from_opengl`: OpenGL `camera_to_world` [..., 3, 4]."""
    check_trailing("world_to_camera", world_to_camera, 3, 4)
    rotation = world_to_camera[..., :3].mT
    center = -(rotation * world_to_camera[..., None, :, 3]).sum(-1)
    return make_se3(rotation * world_to_camera.new_tensor(_FLIP_YZ), center)


def from_colmap(
    qvec: Tensor, tvec: Tensor, model: str, params: Tensor, max_distortion: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """COLMAP images and their camera to `world_to_camera` [..., 3, 4] and `intrinsics` [..., 3, 3].

    COLMAP shares our axes and pixels; its quaternion is scalar first.

    Args:
        qvec: [..., 4], world to camera.
        tvec: [..., 3].
        model: "SIMPLE_PINHOLE", "PINHOLE", or "SIMPLE_RADIAL", "RADIAL", "OPENCV" with negligible distortion.
        params: [..., p], as the model orders them.
        max_distortion: Coefficients up to this size are ignored.

    Raises:
        ValueError: unknown model, wrong number of parameters, or an image that must be undistorted first.
    """
    names = _COLMAP_MODELS.get(model)
    if names is None:
        raise ValueError(
            f"COLMAP camera model {model!r}: expected one of {', '.join(_COLMAP_MODELS)}; "
            "run `colmap image_undistorter`, which writes PINHOLE cameras"
        )
    check_trailing(f"parameters of COLMAP's {model}", params, len(names))
    named = dict(zip(names, params.unbind(-1), strict=True))
    distortion = [value for name, value in named.items() if name[0] in "kp"]
    if distortion and bool((torch.stack(distortion).abs() > max_distortion).any()):
        raise ValueError(
            f"COLMAP camera {model} has distortion above {max_distortion}: "
            "run `colmap image_undistorter` and use its PINHOLE cameras and images"
        )
    focal = torch.stack([named.get("fx", named.get("f")), named.get("fy", named.get("f"))], dim=-1)  # type: ignore[list-item]
    intrinsics = make_intrinsics(focal, torch.stack([named["cx"], named["cy"]], dim=-1))
    return make_se3(quaternion_to_matrix(qvec, "wxyz"), tvec), intrinsics


def to_colmap(world_to_camera: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qvec [..., 4], tvec [..., 3] and PINHOLE parameters [..., 4] (fx, fy, cx, cy)."""
    check_trailing("world_to_camera", world_to_camera, 3, 4)
    focal, principal_point = split_intrinsics(intrinsics)
    qvec = matrix_to_quaternion(world_to_camera[..., :3], "wxyz")
    return qvec, world_to_camera[..., 3], torch.cat([focal, principal_point], dim=-1)


def shift_pixel_center(intrinsics: Tensor, source: float, target: float) -> Tensor:
    """Intrinsics [..., 3, 3] where the first pixel's centre is `target` instead of `source` (0.5 or 0)."""
    check_trailing("intrinsics", intrinsics, 3, 3)
    shift = torch.zeros_like(intrinsics)
    shift[..., :2, 2] = target - source
    return intrinsics + shift


def _ndc_units(image_size: Tensor, intrinsics_format: str) -> tuple[Tensor, Tensor]:
    """Pixels per NDC unit and image centre, both [..., 2] (x, y), for images of (H, W) [..., 2]."""
    check_trailing("image_size", image_size, 2)
    half = image_size.flip(-1) / 2
    if intrinsics_format == "ndc_isotropic":
        return half.amin(-1, keepdim=True).expand_as(half), half
    if intrinsics_format == "ndc_norm_image_bounds":
        return half, half
    known: Sequence[str] = ("ndc_isotropic", "ndc_norm_image_bounds")
    raise ValueError(f"intrinsics_format: expected one of {', '.join(known)}, got {intrinsics_format!r}")
