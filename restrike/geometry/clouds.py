"""Point clouds: normals from neighbours, and rigid registration (ICP)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from restrike.geometry.alignment import umeyama
from restrike.geometry.neighbors import nearest_neighbors
from restrike.geometry.rotations import multiply, rotate

_NORMAL_NEIGHBORS = 30


def estimate_normals(points: Tensor, neighbors: int = _NORMAL_NEIGHBORS) -> Tensor:
    """Unit normals [N, 3] of arbitrary sign: least principal axis of the nearest points, itself among them."""
    points = points.double()
    near = points[nearest_neighbors(points, points, min(neighbors, len(points))).indices]
    near = near - near.mean(1, keepdim=True)
    return torch.linalg.eigh(near.mT @ near).eigenvectors[..., 0]


class Registration(NamedTuple):
    """`transform` [3, 4] source -> target; share of source points with a partner, and their distances' RMS."""

    transform: Tensor
    fitness: Tensor
    inlier_rmse: Tensor


def register_icp(
    source: Tensor, target: Tensor, radius: float = 0.1, max_iterations: int = 30, tolerance: float = 1e-6
) -> Registration:
    """Point-to-point ICP from the identity, rigid (Besl and McKay 1992), with the stopping rule of Open3D.

    Args:
        source: [N, 3].
        target: [M, 3].
        radius: Pairs farther apart than this are no correspondence.
        max_iterations: At most as many updates.
        tolerance: Stops when fitness and RMS both change by less.
    """
    source, target = source.double(), target.double()
    rotation, translation = torch.eye(3).to(source), source.new_zeros(3)
    moved = source
    partners, is_inlier, fitness, rmse = _match(moved, target, radius)
    for _ in range(max_iterations):
        if not is_inlier.any():
            break
        update = umeyama(moved, target[partners], is_inlier.double(), with_scale=False)
        rotation, translation = multiply(update.rotation, rotation), update.apply(translation)
        moved = rotate(rotation, source) + translation
        before = fitness, rmse
        partners, is_inlier, fitness, rmse = _match(moved, target, radius)
        if (fitness - before[0]).abs() < tolerance and (rmse - before[1]).abs() < tolerance:
            break
    return Registration(torch.cat([rotation, translation[:, None]], dim=-1), fitness, rmse)


def _match(moved: Tensor, target: Tensor, radius: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    near = nearest_neighbors(moved, target)
    distances = near.distances[:, 0]
    is_inlier = distances <= radius
    rmse = torch.where(is_inlier, distances, 0.0).square().sum().div(is_inlier.sum().clamp(min=1)).sqrt()
    return near.indices[:, 0], is_inlier, is_inlier.double().mean(), rmse
