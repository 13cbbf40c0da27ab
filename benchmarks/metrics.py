"""Geometry and metrics against the plain way of doing the same, on one CPU thread, float32 inputs.

    python -m benchmarks metrics

The peers are loops as evaluation scripts have them: a camera, a view or a pair at a time; OpenCV for homographies;
all-to-all distances for nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Row, assert_close, compare, environment, pin_threads, record
from restrike import geometry as g
from restrike.metrics.camera_pose import pairwise_pose_errors

COMMAND = "python -m benchmarks metrics"
SCENES, VIEWS, PATCHES = 8, 8, 16


def ring(patches: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """World_to_camera, intrinsics, patch centres and depth of scenes [8, 8] whose cameras all look about forward."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(SCENES, VIEWS, *shape, generator=generator)

    cameras = g.make_se3(g.axis_angle_to_matrix(0.2 * draw(3)), draw(3))
    intrinsics = g.make_intrinsics(3.3 + 0.1 * draw(2), torch.zeros(2))
    coords = g.patch_centers(torch.tensor([0.0, 0, 2, 1]).expand(SCENES, VIEWS, 4), patches)
    return cameras, intrinsics, coords, 3 + draw(patches, patches).tanh()


def cameras_by_opencv(origins: Tensor, endpoints: Tensor, coords: Tensor) -> Tensor:
    """Rotations (world to camera) by one RANSAC homography a camera, as the released evaluation has it."""
    rotations = []
    for o, e, c in zip(origins.flatten(0, 1), endpoints.flatten(0, 1), coords.flatten(0, 1), strict=True):
        directions = e - o.mean(0)
        homography, _ = cv2.findHomography(
            c.numpy(), (directions[:, :2] / directions[:, 2:]).numpy(), cv2.RANSAC, g.RELEASED_INLIER
        )
        homography = homography * np.sign(np.linalg.det(homography))
        q, r = np.linalg.qr(homography[:, ::-1])
        rotations.append((q[:, ::-1] * np.sign(np.diag(r))[::-1]).T)
    return torch.from_numpy(np.stack(rotations)).unflatten(0, origins.shape[:2])


def targets_by_loop(cameras: Tensor, intrinsics: Tensor, coords: Tensor, depth: Tensor) -> Tensor:
    """Ray maps [8, 8, 8, P, P], a view at a time, with 4x4 inverses."""
    maps = []
    for scene in range(SCENES):
        for view in range(VIEWS):
            to_world = torch.linalg.inv(g.homogeneous(cameras[scene, view]))
            inverse = torch.linalg.inv(intrinsics[scene, view])
            pixels = torch.cat([coords[scene, view], torch.ones(PATCHES, PATCHES, 1)], dim=-1).reshape(-1, 3)
            points = (inverse @ pixels.T).T * depth[scene, view].reshape(-1, 1)
            points = (to_world[:3, :3] @ points.T).T + to_world[:3, 3]
            origins = to_world[:3, 3].expand_as(points)
            vectors = [torch.cat([x, torch.ones(len(x), 1)], dim=-1) for x in (origins, points)]
            stacked = torch.cat([x / x.norm(dim=-1, keepdim=True) for x in vectors], dim=-1)
            maps.append(stacked.T.reshape(8, PATCHES, PATCHES))
    return torch.stack(maps).unflatten(0, (SCENES, VIEWS))


def pair_angles_by_loop(predicted: Tensor, true: Tensor) -> Tensor:
    """Rotation angles [8, 28] in radians, a pair at a time."""
    rows = []
    for guess, truth in zip(predicted.double(), true.double(), strict=True):
        for i in range(VIEWS):
            for j in range(i + 1, VIEWS):
                relative = [x[i, :, :3] @ x[j, :, :3].T for x in (guess, truth)]
                cosine = (torch.trace(relative[0] @ relative[1].T) - 1) / 2
                rows.append(torch.acos(cosine.clamp(-1, 1)))
    return torch.stack(rows).unflatten(0, (SCENES, -1))


def nearest_by_all_pairs(queries: Tensor, points: Tensor) -> Tensor:
    """Distances [N], 1024 queries at a time."""
    mode = "donot_use_mm_for_euclid_dist"  # the other one loses half of the digits
    return torch.cat([torch.cdist(part, points, compute_mode=mode).amin(1) for part in queries.split(1024)])


def row(name: str, ours: Callable[[], Tensor], peer: Callable[[], Tensor], peer_name: str, tolerance: float) -> Row:
    """Check, then time; `ours` and `peer` return what is compared."""
    error = assert_close(ours(), peer(), tolerance)
    timing = compare(ours, peer)
    return Row.of(timing, name=name, peer_name=peer_name, checked=f"outputs within {error:.0e}", command=COMMAND)


def main() -> None:
    """Time every row and write the table."""
    pin_threads(1)
    torch.manual_seed(0)
    cameras, intrinsics, coords, depth = ring(PATCHES)
    origins, endpoints = g.ray_origins_and_endpoints(coords, depth, intrinsics, cameras)
    bundle = tuple(x.flatten(2, 3) for x in (origins, endpoints, coords))
    turn = g.axis_angle_to_matrix(0.1 * torch.randn(SCENES, VIEWS, 3))
    guess = g.compose_se3(g.make_se3(turn, torch.zeros(SCENES, VIEWS, 3)), cameras)
    cloud = torch.nn.functional.normalize(torch.randn(20_000, 3, dtype=torch.float64), dim=-1)
    other = cloud + 0.01 * torch.randn_like(cloud)
    rows = [
        row(
            "64 cameras from 16x16 rays, least squares",
            lambda: g.cameras_from_rays(*bundle, is_robust=False).world_to_camera[..., :3],
            lambda: cameras_by_opencv(*bundle),
            "one OpenCV RANSAC a camera",
            1e-3,
        ),
        row(
            "DiffusionSfM ray targets, 64 views of 16x16",
            lambda: g.encode_rays(*g.ray_origins_and_endpoints(coords, depth, intrinsics, cameras)),
            lambda: targets_by_loop(cameras, intrinsics, coords, depth),
            "a view at a time",
            1e-5,
        ),
        row(
            "pair errors (rotation and translation) of 8 scenes x 8 views",
            lambda: pairwise_pose_errors(guess, cameras).rotation,
            lambda: pair_angles_by_loop(guess, cameras),
            "a pair at a time, rotation alone",
            1e-4,
        ),
        row(
            "nearest neighbours, 20,000 x 20,000 points",
            lambda: g.nearest_neighbors(cloud, other).distances[:, 0],
            lambda: nearest_by_all_pairs(cloud, other),
            "all pairs",
            1e-12,
        ),
    ]
    record(*rows, where=f"{environment('opencv-python-headless')}; 1 thread")


if __name__ == "__main__":
    main()
