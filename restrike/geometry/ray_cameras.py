"""Cameras from bundles of rays (DiffusionSfM, arXiv 2505.05473; RayDiffusion, arXiv 2402.14817).

A pinhole camera maps image coordinates x = (X, Y, 1) to directions in the world by A = R K⁻¹, R = camera to world. All
solvers are batched over cameras and none assumes more of the axes than z forward; coordinates and intrinsics share
their unit.

Unusual: the released solver divides directions by their world z (so a view turned by 90° from the first is lost),
fits a homography, and takes A apart as rotation times *lower* triangle, although K⁻¹ is upper: its rotations are off
by about |principal point| / focal even on exact rays. Ours fits 3-vectors, from robust start to robust end, and takes
the right triangle; `cameras_from_rays_released` keeps the published numbers comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from restrike.geometry.cameras import make_intrinsics, make_se3
from restrike.geometry.conventions import check_trailing, full_precision
from restrike.geometry.projection import image_rays
from restrike.geometry.rays import intersect_rays
from restrike.geometry.rotations import multiply, nearest_rotation, rotate

Center = Literal["mean", "intersection"]
HomographyFit = Callable[[Tensor, Tensor, Tensor], Tensor]

RELEASED_INLIER = 0.2  # RANSAC threshold of the release, on directions divided by their z
DEFAULT_FOCAL = 3.453  # of the release, in isotropic NDC, where intrinsics are assumed rather than known

_HYPOTHESES = 64  # minimal samples of 4: at 40 % outliers all of them fail in one of 7000 cameras
_SCORED_RAYS = 256
_MEDIAN_RAYS = 64  # a median of so few still tells a good sample from a bad one
_REFINEMENTS = 3
_MIN_SPREAD = 1e-6  # radians; below this, residuals are rounding and everything is an inlier
_OUTLIER_SPREADS = 3.0
_MIN_Z = 1e-4
# A fit is clean where half of its rays are this near (1.1 degrees) and 95 % of them not much farther: Gaussian noise
# has a ratio of 2.1. Where outliers have pulled a fit away, the first bound fails.
_CLEAN_SINE, _TAIL, _CLEAN_RATIO = 0.02, 0.95, 4.0


class RayCameras(NamedTuple):
    """`world_to_camera` [..., 3, 4] and `intrinsics` [..., 3, 3], in the axes and the unit of the input."""

    world_to_camera: Tensor
    intrinsics: Tensor


@full_precision
def cameras_from_rays(
    ray_origins: Tensor, ray_endpoints: Tensor, coords: Tensor, center: Center = "mean", is_robust: bool = True
) -> RayCameras:
    """Pose and intrinsics of each camera from its rays alone.

    Args:
        ray_origins: [..., N, 3], N ≥ 4.
        ray_endpoints: [..., N, 3].
        coords: [..., N, 2], image coordinates of the rays.
        center: Camera centre: "mean" of the origins (as published) or the "intersection" of the rays.
        is_robust: Start from the best of 64 minimal samples by least median, then drop outliers (on a CPU only where a
            plain fit leaves some); False is one plain least-squares fit over all rays.

    Returns:
        Cameras, NaN where rays are; the two focal lengths are fitted apart, skew is dropped.
    """
    _check_rays(ray_origins, ray_endpoints, coords)
    centers, directions = _centers_and_directions(ray_origins, ray_endpoints, center)
    rays = F.pad(coords.double(), (0, 1), value=1.0)
    if is_robust:
        camera_matrix = _robust_fit(rays, directions)
    else:
        camera_matrix = _linear_fit(rays, directions, torch.ones_like(directions[..., 0]))
    rotation, inverse_intrinsics = _rotation_times_upper(camera_matrix)
    focal = 1 / inverse_intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2]
    intrinsics = make_intrinsics(focal, -inverse_intrinsics[..., :2, 2] * focal)
    return _make_cameras(rotation, centers, intrinsics, ray_origins.dtype)


@full_precision
def cameras_from_rays_known(
    ray_origins: Tensor, ray_endpoints: Tensor, coords: Tensor, intrinsics: Tensor, center: Center = "mean"
) -> RayCameras:
    """Pose of each camera when its intrinsics are known: orthogonal Procrustes between unit rays.

    Args:
        ray_origins: [..., N, 3]; each ray's direction is its own endpoint minus its own origin.
        ray_endpoints: [..., N, 3].
        coords: [..., N, 2].
        intrinsics: [..., 3, 3], in the unit of `coords`.
        center: As in `cameras_from_rays`.
    """
    _check_rays(ray_origins, ray_endpoints, coords)
    centers, _ = _centers_and_directions(ray_origins, ray_endpoints, center)
    directions = F.normalize((ray_endpoints - ray_origins).double(), dim=-1)
    canonical = F.normalize(image_rays(coords.double(), intrinsics.double()), dim=-1)
    rotation = nearest_rotation(directions.mT @ canonical)
    return _make_cameras(rotation, centers, intrinsics, ray_origins.dtype)


@full_precision
def cameras_from_rays_released(
    ray_origins: Tensor, ray_endpoints: Tensor, coords: Tensor, fit: HomographyFit | None = None
) -> RayCameras:
    """As DiffusionSfM's released code does it, defects included (see the top of this file).

    Its intrinsics come back in the usual sense: the release itself calls 1/f the focal length and L₃₁/L₃₃, L₃₂/L₃₃ of
    the lower triangle the principal point; here they are fx, fy and those two numbers.

    Args:
        ray_origins: [..., N, 3].
        ray_endpoints: [..., N, 3].
        coords: [..., N, 2].
        fit: Homography [..., 3, 3] from (coords, targets [..., N, 2], usable [..., N] bool); default
            `fit_homography`. The release calls OpenCV's RANSAC once a camera, whose random samples decide which noisy
            rays its last fit sees; pass a wrapper of it to have the very same digits.
    """
    _check_rays(ray_origins, ray_endpoints, coords)
    centers, directions = _centers_and_directions(ray_origins, ray_endpoints, "mean")
    canonical = F.pad(coords.double(), (0, 1), value=1.0)
    usable = (F.normalize(canonical, dim=-1)[..., 2].abs() > _MIN_Z) & (directions[..., 2].abs() > _MIN_Z)
    z = torch.where(usable, directions[..., 2], 1.0)
    homography = (fit or fit_homography)(coords.double(), directions[..., :2] / z[..., None], usable)
    homography = homography * torch.linalg.det(homography).sign()[..., None, None]
    rotation, lower = _rotation_times_lower(homography)
    lower = lower / lower[..., 2:, 2:]
    intrinsics = make_intrinsics(1 / lower.diagonal(dim1=-2, dim2=-1)[..., :2], lower[..., 2, :2])
    return _make_cameras(rotation, centers, intrinsics, ray_origins.dtype)


@full_precision
def fit_homography(coords: Tensor, targets: Tensor, usable: Tensor, threshold: float = RELEASED_INLIER) -> Tensor:
    """Homography coords -> targets of least squared reprojection error over its inliers, batched.

    Args:
        coords: [..., N, 2].
        targets: [..., N, 2].
        usable: [..., N] bool, rays to look at.
        threshold: Reprojection error, in units of `targets`, that an inlier of the best minimal sample stays below.

    Returns:
        [..., 3, 3].
    """
    rays, directions = (F.pad(x, (0, 1), value=1.0) for x in (coords, targets))
    step = -(-rays.shape[-2] // _SCORED_RAYS)
    hypotheses = _minimal_fits(rays, directions)
    scored = _reprojection(hypotheses, rays[..., None, ::step, :], targets[..., None, ::step, :])
    inliers = (scored.norm(dim=-1) < threshold) & usable[..., None, ::step]
    matrix = _take(hypotheses, inliers.sum(-1).argmax(-1))
    weights = ((_reprojection(matrix, rays, targets).norm(dim=-1) < threshold) & usable).to(targets.dtype)
    matrix = _linear_fit(rays, directions, weights)
    return _refine_homography(matrix / matrix[..., 2:, 2:], rays, targets, weights)


def _check_rays(ray_origins: Tensor, ray_endpoints: Tensor, coords: Tensor) -> None:
    check_trailing("ray_origins", ray_origins, 3)
    check_trailing("ray_endpoints", ray_endpoints, *ray_origins.shape[-2:])
    check_trailing("coords", coords, ray_origins.shape[-2], 2)
    if ray_origins.shape[-2] < 4:
        raise ValueError(f"a camera needs at least 4 rays, got {ray_origins.shape[-2]}")


def _centers_and_directions(ray_origins: Tensor, ray_endpoints: Tensor, center: Center) -> tuple[Tensor, Tensor]:
    """Camera centres [..., 3] and directions endpoint - centre [..., N, 3] (not unit), float64."""
    origins, endpoints = ray_origins.double(), ray_endpoints.double()
    if center == "mean":
        centers = origins.mean(-2)
    elif center == "intersection":
        centers = intersect_rays(origins, endpoints - origins)
    else:
        raise ValueError(f"center: expected 'mean' or 'intersection', got {center!r}")
    return centers, endpoints - centers[..., None, :]


def _make_cameras(rotation: Tensor, centers: Tensor, intrinsics: Tensor, dtype: torch.dtype) -> RayCameras:
    world_to_camera = make_se3(rotation.mT, -rotate(rotation.mT, centers))
    return RayCameras(world_to_camera.to(dtype), intrinsics.to(dtype))


def _linear_fit(rays: Tensor, directions: Tensor, weights: Tensor) -> Tensor:
    """A [..., 3, 3] that minimises Σ w |d × A x|² over |A| = 1, d unit: smallest eigenvector of a 9x9 matrix."""
    d = F.normalize(directions, dim=-1)
    across = torch.eye(3).to(d) - d[..., :, None] * d[..., None, :]
    outer = rays[..., :, None] * rays[..., None, :] * weights[..., None, None]
    # Normal equations of vec(A) with entries A[c, a] at 3a + c: Σ w x_a x_b (1 - d dᵀ)_cd, as one 9xN by Nx9 product.
    product = outer.flatten(-2).mT @ across.flatten(-2)
    system = product.unflatten(-1, (3, 3)).unflatten(-3, (3, 3)).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    # A diverged network's NaN must cost its own view only: eigh would raise for the batch.
    finite = system.isfinite().all((-1, -2))[..., None, None]
    vectors = torch.linalg.eigh(torch.where(finite, system, 0.0)).eigenvectors
    return torch.where(finite, vectors[..., 0].unflatten(-1, (3, 3)).mT, torch.nan)


def _robust_fit(rays: Tensor, directions: Tensor) -> Tensor:
    """A fit that outliers do not see; on a CPU the plain one where nearly all rays agree with it."""
    if rays.device.type != "cpu":
        return _least_median_fit(rays, directions)  # cheap there, and to ask for less would wait for the device
    matrix = _linear_fit(rays, directions, torch.ones_like(directions[..., 0]))
    sine = _sines(matrix, rays, directions)
    count = sine.shape[-1]
    middle, tail = (sine.kthvalue(k, dim=-1).values for k in (count // 2 + 1, math.ceil(_TAIL * count)))
    # NaN is not below anything, so a lost view goes the long way, and stays NaN.
    is_clean = (middle < _CLEAN_SINE) & (tail < _CLEAN_RATIO * middle.clamp(min=_MIN_SPREAD))
    if bool(is_clean.all()):
        return matrix
    rays = rays.expand(*directions.shape[:-2], *rays.shape[-2:])
    matrix = matrix.clone()
    matrix[~is_clean] = _least_median_fit(rays[~is_clean], directions[~is_clean])
    return matrix


def _least_median_fit(rays: Tensor, directions: Tensor) -> Tensor:
    """Least median of minimal samples, then reweighted linear fits without the outliers."""
    step = -(-rays.shape[-2] // _MEDIAN_RAYS)
    hypotheses = _minimal_fits(rays, directions)
    # float32 is enough to choose by, at half the cost; all that is computed from the choice is float64.
    mapped = hypotheses.float() @ rays[..., None, ::step, :].mT.float()
    unit = F.normalize(directions[..., None, ::step, :], dim=-1).mT.float()
    square_sine = 1 - (mapped * unit).sum(-2).square() / mapped.square().sum(-2)
    best = square_sine.nan_to_num(nan=torch.inf).median(dim=-1).values.argmin(-1)
    matrix = _take(hypotheses, best)
    for _ in range(_REFINEMENTS):
        sine = _sines(matrix, rays, directions)
        # 1.4826 · median is the standard deviation of a Gaussian; floored, so that exact rays all count.
        spread = (1.4826 * sine.median(dim=-1, keepdim=True).values).clamp(min=_MIN_SPREAD)
        scale = rotate(matrix, rays).square().sum(-1)
        weights = (sine < _OUTLIER_SPREADS * spread) / scale.clamp(min=1e-12)
        matrix = _linear_fit(rays, directions, weights)
    return matrix


def _sines(matrix: Tensor, rays: Tensor, directions: Tensor) -> Tensor:
    """Sine of the angle between A x and d, [..., N], or 1 beyond 90°; the sign of A is free; exact near 0."""
    mapped = F.normalize(rotate(matrix, rays), dim=-1)
    mapped = mapped * (mapped * directions).sum(-1).sign().sum(-1).sign()[..., None, None]
    directions = F.normalize(directions, dim=-1).expand_as(mapped)
    sine = torch.linalg.cross(mapped, directions).norm(dim=-1)
    return torch.where((mapped * directions).sum(-1) > 0, sine, 1.0)


def _minimal_fits(rays: Tensor, directions: Tensor) -> Tensor:
    """A [..., hypotheses, 3, 3] through 4 rays each: A = Σ_i λ_i d_i (x_j × x_k)ᵀ, λ from the fourth ray.

    Degenerate samples give zeros or NaN, which score worst.
    """
    generator = torch.Generator().manual_seed(0)  # the same samples for every camera, on every device
    picks = torch.rand(_HYPOTHESES, rays.shape[-2], generator=generator).topk(4, dim=-1).indices.to(rays.device)
    x, d = rays[..., picks, :].unbind(-2), F.normalize(directions, dim=-1)[..., picks, :].unbind(-2)
    matrix = torch.zeros(*x[0].shape, 3, dtype=x[0].dtype, device=x[0].device)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        x_normal, d_normal = torch.linalg.cross(x[j], x[k]), torch.linalg.cross(d[j], d[k])
        factor = (d_normal * d[3]).sum(-1) / (x_normal * x[3]).sum(-1)
        matrix = matrix + factor[..., None, None] * d[i][..., :, None] * x_normal[..., None, :]
    return matrix


def _take(hypotheses: Tensor, best: Tensor) -> Tensor:
    """Hypothesis [..., 3, 3] number `best` [...] out of [..., K, 3, 3]."""
    return hypotheses.take_along_dim(best[..., None, None, None], dim=-3).squeeze(-3)


def _reprojection(matrix: Tensor, canonical: Tensor, targets: Tensor) -> Tensor:
    mapped = rotate(matrix, canonical)
    return mapped[..., :2] / mapped[..., 2:] - targets


def _refine_homography(matrix: Tensor, canonical: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Ten Gauss-Newton steps on Σ w |reprojection|² over the eight free entries (h₃₃ = 1)."""
    for _ in range(10):
        mapped = rotate(matrix, canonical)
        x = canonical / mapped[..., 2:]
        projected = mapped[..., :2] / mapped[..., 2:]
        zero = torch.zeros_like(x)
        rows = [
            torch.cat([x, zero, -projected[..., :1] * x[..., :2]], dim=-1),
            torch.cat([zero, x, -projected[..., 1:] * x[..., :2]], dim=-1),
        ]
        jacobian = torch.stack(rows, dim=-2)  # [..., N, 2, 8]
        weighted = (jacobian * weights[..., None, None]).flatten(-3, -2)
        jacobian, residual = jacobian.flatten(-3, -2), (targets - projected).flatten(-2)
        step = torch.linalg.solve_ex(weighted.mT @ jacobian, weighted.mT @ residual[..., None]).result[..., 0]
        matrix = matrix + F.pad(step, (0, 1)).unflatten(-1, (3, 3))
    return matrix


def _rotation_times_upper(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A = R U up to scale: R a rotation, U upper triangular with positive diagonal and U₃₃ = 1."""
    matrix = matrix * torch.linalg.det(matrix).sign()[..., None, None]
    q, r = torch.linalg.qr(matrix)
    signs = r.diagonal(dim1=-2, dim2=-1).sign()
    upper = r * signs[..., :, None]
    return q * signs[..., None, :], upper / upper[..., 2:, 2:]


def _rotation_times_lower(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A = R L: L lower triangular with positive diagonal; the QR of A with its columns in reverse."""
    q, r = torch.linalg.qr(matrix.flip(-1))
    rotation, lower = q.flip(-1), r.flip(-2, -1)
    signs = lower.diagonal(dim1=-2, dim2=-1).sign()
    return multiply(rotation, torch.diag_embed(signs)), lower * signs[..., :, None]
