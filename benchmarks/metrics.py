"""Geometry and metrics against the plain way of doing the same, on one CPU thread, float32 inputs.

    python -m benchmarks metrics

The peers are loops as evaluation scripts have them: a view, a pair or a point at a time; all-to-all distances for
nearest neighbours.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Row, assert_close, compare, environment, pin_threads, record
from restrike import geometry as g
from restrike.metrics.camera_pose import PoseAccuracy
from restrike.metrics.reconstruction import cloud_errors

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


def pose_scores_by_loop(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """RRA, RTA, mAA and AUC of scenes [S, V, 3, 4], a pair at a time, as evaluation scripts do it."""
    errors = []
    for guess, truth in zip(predicted.double(), true.double(), strict=True):
        four = [torch.stack([g.homogeneous(camera) for camera in cameras]) for cameras in (guess, truth)]
        for i, j in itertools.combinations(range(len(truth)), 2):
            first, second = (cameras[i] @ torch.linalg.inv(cameras[j]) for cameras in four)
            cosine = (torch.trace(first[:3, :3] @ second[:3, :3].T) - 1) / 2
            rotation = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
            ends = [matrix[:3, 3] / matrix[:3, 3].norm() for matrix in (first, second)]
            translation = torch.rad2deg(torch.acos(torch.dot(*ends).abs().clamp(max=1)))
            errors.append((float(rotation), float(translation)))
    rotation, translation = np.array(errors).T
    both = np.maximum(rotation, translation)

    def below(values: np.ndarray, limit: int) -> float:
        return float((values < limit).mean())

    scores = {f"rra@{t}": below(rotation, t) for t in (5, 15, 30)}
    scores |= {f"rta@{t}": below(translation, t) for t in (5, 15, 30)}
    minima = [min(below(rotation, t), below(translation, t)) for t in range(1, 31)]
    scores["maa@30"] = float(np.mean(minima))
    return scores | {f"auc@{t}": float(np.mean([below(both, k) for k in range(1, t + 1)])) for t in (3, 5, 10, 15, 30)}


def pose_scores(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """The same by the metric: one update, one compute."""
    metric = PoseAccuracy()
    metric.update(predicted, true)
    return {name: float(value) for name, value in metric.compute().items()}


def poses_row(scenes: int) -> Row:
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randn(scenes, VIEWS, 3, generator=generator, dtype=torch.float64)

    true = g.make_se3(g.axis_angle_to_matrix(draw()), draw())
    guess = g.compose_se3(g.make_se3(g.axis_angle_to_matrix(0.1 * draw()), 0.1 * draw()), true)
    found, wanted = pose_scores(guess, true), pose_scores_by_loop(guess, true)
    assert found.keys() == wanted.keys()
    worst = max(abs(found[name] - wanted[name]) for name in found)
    assert worst < 1e-9, f"scores differ by {worst:.0e}: nothing was timed"
    timing = compare(
        lambda: pose_scores(guess, true),
        lambda: pose_scores_by_loop(guess, true),
        rounds=7,
        warmup=1,
        min_round_s=0.1,
        clock=time.process_time,
    )
    return Row.of(
        timing,
        name=f"Pose metrics of {scenes * VIEWS * (VIEWS - 1) // 2:,} pairs: RRA, RTA, mAA, AUC, update and compute",
        peer_name="a pair at a time, 4x4 inverses",
        checked=f"all {len(found)} scores within {worst:.0e}",
        command=COMMAND,
    )


def reconstruction_by_pairs(predicted: Tensor, true: Tensor, normals: Tensor, others: Tensor) -> Tensor:
    """Accuracy, completeness and normal consistency (mean and median of each), a query point at a time."""
    rows = []
    for source, target, own, there in ((predicted, true, normals, others), (true, predicted, others, normals)):
        distances, cosines = [], []
        for point, normal in zip(source, own, strict=True):
            square = (target - point).square().sum(-1)
            nearest = int(square.argmin())
            distances.append(float(square[nearest].sqrt()))
            cosines.append(abs(float(torch.dot(normal, there[nearest]))))
        rows += [np.mean(distances), np.median(distances), np.mean(cosines), np.median(cosines)]
    return torch.tensor(rows, dtype=torch.float64)


def reconstruction(predicted: Tensor, true: Tensor, normals: Tensor, others: Tensor) -> Tensor:
    pair = (cloud_errors(predicted, true, normals, others), cloud_errors(true, predicted, others, normals))
    return torch.stack([value for errors in pair for value in errors])


def nearest_by_all_pairs(queries: Tensor, points: Tensor) -> Tensor:
    """Distances [N], 1024 queries at a time."""
    mode = "donot_use_mm_for_euclid_dist"  # the other one loses half of the digits
    return torch.cat([torch.cdist(part, points, compute_mode=mode).amin(1) for part in queries.split(1024)])


def row(
    name: str,
    ours: Callable[[], Tensor],
    peer: Callable[[], Tensor],
    peer_name: str,
    tolerance: float,
) -> Row:
    """Check, then time; `ours` and `peer` return what is compared."""
    error = assert_close(ours(), peer(), tolerance)
    timing = compare(ours, peer, rounds=7, warmup=1, min_round_s=0.1, clock=time.process_time)
    return Row.of(timing, name=name, peer_name=peer_name, checked=f"outputs within {error:.0e}", command=COMMAND)


def main() -> None:
    """Time every row and write the table."""
    pin_threads(1)
    torch.manual_seed(0)
    cameras, intrinsics, coords, depth = ring(PATCHES)
    cloud = torch.nn.functional.normalize(torch.randn(10_000, 3, dtype=torch.float64), dim=-1)
    other = cloud + 0.01 * torch.randn_like(cloud)
    small = cloud[:4_000]  # on a sphere, so its own normals
    near = small + 0.01 * torch.randn_like(small)
    normals = torch.nn.functional.normalize(near, dim=-1)
    rows = [
        row(
            "DiffusionSfM ray targets, 64 views of 16x16",
            lambda: g.encode_rays(*g.ray_origins_and_endpoints(coords, depth, intrinsics, cameras)),
            lambda: targets_by_loop(cameras, intrinsics, coords, depth),
            "a view at a time",
            1e-5,
        ),
        poses_row(357),
        row(
            "Reconstruction metrics of 4,000 x 4,000 points: accuracy, completeness, normal consistency",
            lambda: reconstruction(near, small, normals, small),
            lambda: reconstruction_by_pairs(near, small, normals, small),
            "a point at a time",
            1e-9,
        ),
        row(
            "Nearest neighbours, 10,000 x 10,000 points",
            lambda: g.nearest_neighbors(cloud, other).distances[:, 0],
            lambda: nearest_by_all_pairs(cloud, other),
            "all pairs",
            1e-12,
        ),
    ]
    record(*rows, where=f"{environment()}; 1 thread")


if __name__ == "__main__":
    main()
