"""No function makes a tensor on another device than its input's: on the meta device, mixing them fails at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from restrike import geometry as g
from restrike.metrics import camera_pose, depth

ALIGNMENTS = ("metric", "median", "scale", "least_squares")


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


CAMERAS, INTRINSICS, DEPTH, COORDS = meta(2, 3, 3, 4), meta(2, 3, 3, 3), meta(2, 3, 8, 8), meta(2, 3, 8, 8, 2)
RAYS, POINTS, VALID = (meta(2, 3, 64, 3), meta(2, 3, 64, 3), meta(2, 3, 64, 2)), meta(2, 3, 8, 8, 3), DEPTH > 0
P3D = g.PyTorch3DCameras(meta(2, 3, 3), meta(2, 3), meta(2, 2), meta(2, 2))
CALLS: dict[str, Callable[[], object]] = {
    "rigid transforms": lambda: g.compose_se3(g.invert_se3(g.to_first_camera(CAMERAS)), CAMERAS),
    "homogeneous": lambda: g.homogeneous(CAMERAS),
    "vggt encoding": lambda: g.decode_pose_fov(g.encode_pose_fov(CAMERAS, INTRINSICS, (8, 8)), (8, 8)),
    "cut3r encoding": lambda: g.relative_pose_encoding(g.encode_pose(CAMERAS), g.encode_pose(CAMERAS)),
    "axis angle": lambda: g.axis_angle_to_matrix(meta(2, 3)),
    "pytorch3d": lambda: g.to_pytorch3d(*g.from_pytorch3d(P3D, torch.tensor([4, 6])), torch.tensor([4, 6])),
    "opengl": lambda: g.to_opengl(g.from_opengl(CAMERAS)),
    "colmap": lambda: g.to_colmap(CAMERAS, INTRINSICS),
    "projection": lambda: g.project_points(g.unproject_depth(DEPTH, INTRINSICS, CAMERAS), INTRINSICS, CAMERAS),
    "focal": lambda: g.focal_from_points(POINTS, meta(2, 3, 2)),
    "pixel rays": lambda: g.ray_moments(*g.pixel_rays(INTRINSICS, CAMERAS, (8, 8))),
    "cut3r ray map": lambda: g.cut3r_ray_map(INTRINSICS, CAMERAS, CAMERAS, (8, 8)),
    "ray targets": lambda: g.decode_rays(
        g.encode_rays(*g.ray_origins_and_endpoints(COORDS, DEPTH, INTRINSICS, CAMERAS))
    ),
    "first view median": lambda: g.normalize_to_first_view_median(CAMERAS, DEPTH, INTRINSICS, COORDS),
    "mean distance": lambda: g.normalize_to_mean_distance(CAMERAS, POINTS, DEPTH, VALID),
    "confidence": lambda: g.confidence_weighted_distance(POINTS, VALID, DEPTH),
    "median distance": lambda: g.distance_to_median(POINTS, VALID),
    "crops": lambda: g.resize_intrinsics(g.crop_intrinsics(INTRINSICS, 1, 2), 0.5, 2.0),
    "quarter turn": lambda: g.rotate_camera_90(CAMERAS, INTRINSICS, (8, 8), clockwise=True),
    "patches": lambda: g.patch_centers(g.crop_parameters(meta(2, 4), meta(2)), 8),
    "umeyama": lambda: g.umeyama(RAYS[0], RAYS[1], meta(2, 3, 64)).apply(RAYS[0]),
    "known cameras": lambda: g.cameras_from_rays_known(*RAYS, INTRINSICS),
    "robust cameras": lambda: g.cameras_from_rays(*RAYS),
    "intersected cameras": lambda: g.cameras_from_rays(*RAYS, "intersection", is_robust=False),
    "released cameras": lambda: g.cameras_from_rays_released(*RAYS),
    "pair errors": lambda: camera_pose.pairwise_pose_errors(CAMERAS, CAMERAS),
    "centre errors": lambda: camera_pose.center_errors(CAMERAS, CAMERAS),
    "trajectory errors": lambda: camera_pose.trajectory_errors(CAMERAS, CAMERAS),
    "depth errors": lambda: depth.depth_errors(DEPTH[0, 0], DEPTH[0, 0], VALID[0, 0]),
    "depth alignment": lambda: [depth.align_depth(DEPTH[0, 0], DEPTH[0, 0], VALID[0, 0], a) for a in ALIGNMENTS],  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CALLS)
def test_everything_stays_on_the_device_of_its_input(name: str) -> None:
    CALLS[name]()
