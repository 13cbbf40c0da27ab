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

import functools
from collections.abc import Callable, Sequence
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
_SCORED_RAYS, _SCORED_CAMERAS = 64, 16  # at once, so that what is compared stays in a core's cache
_HOMOGRAPHY_RAYS = 256
_SCORE_SINE = 0.01  # residuals below this hardly tell one hypothesis from another
_SAMPLED_RAYS = 1024  # of a camera, by which its outliers are told
_PAIR = torch.tensor([[0, 1, 3], [1, 2, 4], [3, 4, 5]])  # where the product of two coordinates stands in `_Rays`
_BLOCK_RAYS = 32768  # float64 temporaries of so many stay in a core's cache: three times as fast on dense maps
_REFINEMENTS = 2
_MIN_SPREAD = 1e-6  # radians; below this, residuals are rounding and everything is an inlier
_OUTLIER_SPREADS = 3.0
_MIN_Z = 1e-4
# A fit is clean where half of its rays are this near (1.1 degrees) and none much farther: of a thousand rays with
# Gaussian noise the farthest is 3.2 medians away. Where outliers have pulled a fit away, the first bound fails.
_CLEAN_SINE, _CLEAN_RATIO = 0.02, 5.0


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
            plain fit of up to 1024 rays leaves some); False is one plain least-squares fit over all rays.

    Returns:
        Cameras, NaN where rays are; the two focal lengths are fitted apart, skew is dropped.
    """
    _check_rays(ray_origins, ray_endpoints, coords)
    centers = _centers(ray_origins, ray_endpoints, center)
    lead = torch.broadcast_shapes(coords.shape[:-2], ray_endpoints.shape[:-2])
    places, ends = (x.broadcast_to(*lead, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (coords, ray_endpoints))
    middles = centers.broadcast_to(*lead, 3).reshape(-1, 3)
    matrices = _robust_fit(places, ends, middles) if is_robust else _linear_fit(places, ends, middles)
    camera_matrix = matrices.reshape(*lead, 3, 3)
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
    centers = _centers(ray_origins, ray_endpoints, center)
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
    centers = _centers(ray_origins, ray_endpoints, "mean")
    directions = ray_endpoints.double() - centers[..., None, :]
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
    homogeneous, directions = (F.pad(x, (0, 1), value=1.0) for x in (coords, targets))
    rays = _columns(coords, directions, torch.zeros_like(directions[..., 0, :], dtype=torch.float64))
    step = -(-coords.shape[-2] // _HOMOGRAPHY_RAYS)
    hypotheses = _minimal_fits(rays.x, rays.d).to(targets.dtype)
    scored = _reprojection(hypotheses, homogeneous[..., None, ::step, :], targets[..., None, ::step, :])
    inliers = (scored.norm(dim=-1) < threshold) & usable[..., None, ::step]
    matrix = _take(hypotheses, inliers.sum(-1).argmax(-1))
    weights = ((_reprojection(matrix, homogeneous, targets).norm(dim=-1) < threshold) & usable).to(targets.dtype)
    matrix = _fit(_moments(rays, weights[..., None, :].double())).to(targets.dtype)
    return _refine_homography(matrix / matrix[..., 2:, 2:], homogeneous, targets, weights)


def _check_rays(ray_origins: Tensor, ray_endpoints: Tensor, coords: Tensor) -> None:
    check_trailing("ray_origins", ray_origins, 3)
    check_trailing("ray_endpoints", ray_endpoints, *ray_origins.shape[-2:])
    check_trailing("coords", coords, ray_origins.shape[-2], 2)
    if ray_origins.shape[-2] < 4:
        raise ValueError(f"a camera needs at least 4 rays, got {ray_origins.shape[-2]}")


def _centers(ray_origins: Tensor, ray_endpoints: Tensor, center: Center) -> Tensor:
    """Camera centres [..., 3], float64."""
    if center == "mean":
        flat = ray_origins.reshape(-1, *ray_origins.shape[-2:])
        parts = flat.split(max(1, _BLOCK_RAYS // flat.shape[-2]))  # all in float64 at once would not stay in the cache
        return torch.cat([part.double().mean(-2) for part in parts]).reshape(*ray_origins.shape[:-2], 3)
    if center == "intersection":
        return intersect_rays(ray_origins.double(), (ray_endpoints.double() - ray_origins.double()))
    raise ValueError(f"center: expected 'mean' or 'intersection', got {center!r}")


def _make_cameras(rotation: Tensor, centers: Tensor, intrinsics: Tensor, dtype: torch.dtype) -> RayCameras:
    world_to_camera = make_se3(rotation.mT, -rotate(rotation.mT, centers))
    return RayCameras(world_to_camera.to(dtype), intrinsics.to(dtype))


def _linear_fit(
    coords: Tensor,
    endpoints: Tensor,
    centers: Tensor,
    start: Tensor | None = None,
    limit: Tensor | None = None,
    is_plain: Sequence[bool] = (),
) -> Tensor:
    """A [B, 3, 3] that minimises Σ w |d × A x|² / Σ w |A x|², x = (X, Y, 1), d the unit direction of each ray.

    Args:
        coords: [B, N, 2].
        endpoints: [B, N, 3].
        centers: [B, 3].
        start: [B, 3, 3]; w is 1 without it, else that of `_weights` by it.
        limit: [B, 1, 1], of `_weights`.
        is_plain: Of B cameras, those that may do without weights; none where it is empty.
    """
    count = coords.shape[-2]
    per_block = max(1, _BLOCK_RAYS // count)  # cameras
    sums = []
    for cameras in (slice(i, i + per_block) for i in range(0, len(coords), per_block)):
        parts = []
        for first in range(0, count, _BLOCK_RAYS):
            place = (cameras, slice(first, first + _BLOCK_RAYS))
            rays = _columns(coords[place], endpoints[place], centers[cameras])
            weights: Tensor | float = 1.0
            if start is not None and limit is not None and not (is_plain and all(is_plain[cameras])):
                weights = _weights(*_square_sines(start[cameras], rays), limit[cameras])
            parts.append(_moments(rays, weights))
        sums.append(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))
    return _fit(torch.cat(sums))


class _Rays(NamedTuple):
    """x = (X, Y, 1), direction d, [..., 3, N] each, products of two of their coordinates, [..., 6, N], and 1 / |d|²."""

    x: Tensor
    d: Tensor
    xx: Tensor
    dd: Tensor
    inverse: Tensor

    def pick(self, rows: Tensor) -> _Rays:
        return _Rays(*(each[rows] for each in self))


def _columns(coords: Tensor, endpoints: Tensor, centers: Tensor) -> _Rays:
    """In float64, one coordinate a row, so that elementwise work runs along the rays."""
    rows, flat = (x.mT.to(torch.float64, memory_format=torch.contiguous_format) for x in (endpoints, coords))
    d = rows - centers[..., None]
    one = torch.ones_like(flat[..., :1, :])
    xx = torch.cat([flat[..., :1, :] * flat, flat[..., 1:, :].square(), flat, one], dim=-2)
    dd = torch.cat([d[..., :1, :] * d[..., :2, :], d[..., 1:2, :].square(), d[..., 2:, :] * d], dim=-2)
    length = dd[..., :1, :] + dd[..., 2:3, :] + dd[..., 5:, :]  # squared
    return _Rays(xx[..., 3:, :], d, xx, dd, 1 / length.clamp(min=1e-24))


def _moments(rays: _Rays, weights: Tensor | float = 1.0) -> Tensor:
    """Σ w x_a x_b d_c d_d / |d|², [..., 6, 6], a and b along one side; weights [..., 1, N]."""
    return rays.xx * (rays.inverse * weights) @ rays.dd.mT


def _fit(moments: Tensor) -> Tensor:
    """A of smallest Σ w |d × A x|² / Σ w |A x|², from `_moments`: an eigenvector, vec(A) having A[c, a] at 3a + c.

    Over Σ w |A x|² and not over |A|², because noise adds to the first sum in proportion to it: with |A|² a fit to more
    rays comes no nearer to the truth. Where x is made white, both are one.
    """
    pair = _PAIR.to(moments.device)
    moments = moments[..., pair[:, None, :, None], pair[None, :, None, :]]  # at [..., a, c, b, d]
    outer = moments.diagonal(dim1=-3, dim2=-1).sum(-1)  # Σ w x xᵀ
    whiten = torch.linalg.inv_ex(torch.linalg.cholesky_ex(outer).L).inverse
    both = (whiten[..., :, None, :, None] * torch.eye(3).to(outer)[:, None, :]).flatten(-2).flatten(-3, -2)
    system = both @ moments.flatten(-2).flatten(-3, -2) @ both.mT
    # A diverged network's NaN must cost its own view only: eigh would raise for the batch.
    finite = system.isfinite().all((-1, -2))[..., None, None]
    vectors = torch.linalg.eigh(torch.where(finite, system, 0.0)).eigenvectors
    return torch.where(finite, vectors[..., -1].unflatten(-1, (3, 3)).mT @ whiten, torch.nan)


def _robust_fit(coords: Tensor, endpoints: Tensor, centers: Tensor) -> Tensor:
    """A fit that outliers do not see; on a CPU the plain one for cameras whose sampled rays all agree with it.

    Outliers are told by a sample of the rays; the last fit is over all of them. Arguments as in `_linear_fit`.
    """
    is_dense = coords.shape[-2] > _SAMPLED_RAYS
    sampled = (_sample(coords), _sample(endpoints)) if is_dense else (coords, endpoints)
    rays = _columns(*sampled, centers)
    if coords.device.type != "cpu":  # the long way is cheap there, and to ask for less would wait for the device
        matrix = _sampled_fit(rays)
        return _linear_fit(coords, endpoints, centers, matrix, _own_limit(matrix, rays)) if is_dense else matrix
    matrix = _fit(_moments(rays))
    is_clean = _is_clean(_square_sines(matrix, rays)[0][:, 0])
    wild = (~is_clean).nonzero()[:, 0]
    if len(wild) == 0:
        return _linear_fit(coords, endpoints, centers) if is_dense else matrix
    matrix = matrix.index_copy(0, wild, _sampled_fit(rays if len(wild) == len(coords) else rays.pick(wild)))
    if not is_dense:
        return matrix
    limit = torch.where(is_clean[:, None, None], torch.inf, _own_limit(matrix, rays))
    return _linear_fit(coords, endpoints, centers, matrix, limit, is_clean.tolist())


def _is_clean(square_sine: Tensor) -> Tensor:
    """Whether a fit has no outliers, [B] from [B, N]. NaN is below nothing, so a lost view goes the long way."""
    farthest = square_sine.amax(-1)
    is_clean = farthest < (_CLEAN_RATIO * _CLEAN_SINE) ** 2
    if is_clean.any():  # else without medians, which cost as much as a fit
        middle = square_sine.median(dim=-1).values.clamp(min=_MIN_SPREAD**2)
        is_clean = (middle < _CLEAN_SINE**2) & (farthest < _CLEAN_RATIO**2 * middle)
    return is_clean


def _own_limit(matrix: Tensor, rays: _Rays) -> Tensor:
    """`_limit` [B, 1, 1] of the rays by their own fit."""
    return _limit(_square_sines(matrix, rays)[0])


def _sample(rays: Tensor) -> Tensor:
    """Some of [B, N, C], the same for every camera; at random, as a stride would see a few columns of a map."""
    picks = torch.randperm(rays.shape[-2], generator=torch.Generator().manual_seed(0))[:_SAMPLED_RAYS]
    return rays[:, picks.sort().values.to(rays.device)]


def _sampled_fit(rays: _Rays) -> Tensor:
    """The best of the minimal samples of B cameras, refined by fits without outliers."""
    # float32 is enough to choose by, at half the cost; all that is computed from the choice is float64.
    # Directions have unit length here: the eighth power of theirs in millimetres, say, is no number in float32.
    x, d, xx = (each.float() for each in (rays.x, rays.d * rays.inverse.sqrt(), rays.xx))
    step = -(-x.shape[-1] // _SCORED_RAYS)
    best = []
    for part in zip(*(each.split(_SCORED_CAMERAS) for each in (x, d, xx)), strict=True):
        hypotheses = _minimal_fits(*part[:2])
        best.append(_take(hypotheses, _best(hypotheses, *(each[..., ::step].contiguous() for each in part))))
    matrix = torch.cat(best).double()
    for _ in range(_REFINEMENTS):
        square_sine, square = _square_sines(matrix, rays)
        matrix = _fit(_moments(rays, _weights(square_sine, square, _limit(square_sine))))
    return matrix


def _best(hypotheses: Tensor, x: Tensor, d: Tensor, xx: Tensor) -> Tensor:
    """Number [B] of the hypothesis with the smallest sum of log squared sines: far rays cost little more than near."""
    products = (x[:, :, None] * d[:, None]).flatten(1, 2)  # x_a d_c at 3a + c
    dot = hypotheses.mT.flatten(-2) @ products
    square = multiply(hypotheses.mT, hypotheses).flatten(-2) @ xx[:, _PAIR.flatten()]  # xᵀ (AᵀA) x
    cost = ((1 - dot.square() / square).clamp(min=0) + _SCORE_SINE**2).log().sum(-1)
    return cost.nan_to_num(nan=torch.inf).argmin(-1)


def _limit(square_sine: Tensor) -> Tensor:
    """Squared sine [..., 1] beyond which a ray is an outlier, from those of all rays [..., N]."""
    middle = square_sine.median(dim=-1, keepdim=True).values
    # 1.4826 · median is the standard deviation of a Gaussian; floored, so that exact rays all count.
    return (_OUTLIER_SPREADS * 1.4826) ** 2 * middle.clamp(min=(_MIN_SPREAD / 1.4826) ** 2)


def _weights(square_sine: Tensor, square: Tensor, limit: Tensor) -> Tensor:
    """1 / |A x|² where A x is near d, else 0: then Σ w |d × A x|² is a sum of squared sines."""
    return torch.where(square_sine < limit, 1 / square.clamp(min=1e-12), 0.0)


def _square_sines(matrix: Tensor, rays: _Rays) -> tuple[Tensor, Tensor]:
    """Squared sines of the angles between A x and d, and |A x|², [..., 1, N] each, for A [..., 3, 3].

    Neither the sign of A nor that of d counts, as in the fit.
    """
    mapped = matrix @ rays.x
    square, dot = mapped.square().sum(-2, keepdim=True), (mapped * rays.d).sum(-2, keepdim=True)
    return (1 - dot.square() / square * rays.inverse).clamp(min=0), square


def _minimal_fits(x: Tensor, d: Tensor) -> Tensor:
    """A [..., hypotheses, 3, 3] through 4 rays each: A = Σ_i λ_i d_i (x_j × x_k)ᵀ, λ from the fourth ray.

    Degenerate samples give zeros or NaN, which score worst. From [..., 3, N] twice.
    """
    index = _minimal_samples(x.shape[-1]).to(x.device)

    def picked(rays: Tensor) -> tuple[Tensor, ...]:
        found = rays.gather(-1, index.flatten().expand(*rays.shape[:-1], -1))  # x[..., index] takes six times as long
        return found.unflatten(-1, index.shape).split((3, 3, 3, 1), dim=-2)

    _, *x_others, x_fourth = picked(x)
    d, *d_others, d_fourth = picked(d)  # [..., 3, 3, hypotheses]
    x_normal, d_normal = (torch.linalg.cross(*others, dim=-3) for others in (x_others, d_others))
    factor = (d_normal * d_fourth).sum(-3) / (x_normal * x_fourth).sum(-3)
    parts = (factor[..., None, :, :] * d)[..., :, None, :, :] * x_normal[..., None, :, :, :]
    return parts.sum(-2).movedim(-1, -3).contiguous()


@functools.lru_cache(maxsize=16)
def _minimal_samples(count: int) -> Tensor:
    """Numbers of rays out of `count`, [10, hypotheses], the same for every camera, on every device.

    Three rays i, the j and k that make a triple with each, and a fourth ray; the four are different.
    """
    generator = torch.Generator().manual_seed(0)
    four = torch.rand(_HYPOTHESES, count, generator=generator).topk(4, dim=-1).indices.mT
    return four[[0, 1, 2, 1, 2, 0, 2, 0, 1, 3]].contiguous()


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
