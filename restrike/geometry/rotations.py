"""Rotations: 3x3 products that TF32 cannot touch, quaternions in both orders, axis-angle, angles, nearest rotation.

VGGT writes quaternions scalar last ("xyzw"), CUT3R and COLMAP scalar first ("wxyz"): the order is always an argument.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from restrike.geometry.conventions import check_trailing, full_precision

QuaternionOrder = Literal["xyzw", "wxyz"]


def align_left(matrix: Tensor, vectors: Tensor) -> Tensor:
    """View of `matrix` [*lead, m, n] with as many dimensions inserted as `vectors` [*lead, *any, c] has in `any`.

    Raises:
        ValueError: the leading dimensions do not fit.
    """
    lead = matrix.shape[:-2]
    extra = vectors.ndim - 1 - len(lead)
    fits = extra >= 0 and all(a == b or 1 in (a, b) for a, b in zip(lead, vectors.shape, strict=False))
    if not fits:
        raise ValueError(f"leading dimensions {list(lead)} of the matrix do not begin those of {list(vectors.shape)}")
    return matrix.reshape(*lead, *(1,) * extra, *matrix.shape[-2:])


@full_precision
def rotate(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Apply a 3x3 matrix to vectors, in full float32 (no matmul, so no TF32).

    Args:
        matrix: [*lead, 3, 3].
        vectors: [*lead, *any, 3].

    Returns:
        [*lead, *any, 3].
    """
    check_trailing("matrix", matrix, 3, 3)
    check_trailing("vectors", vectors, 3)
    m = align_left(matrix, vectors)
    x, y, z = vectors.split(1, dim=-1)
    return m[..., 0] * x + m[..., 1] * y + m[..., 2] * z


@full_precision
def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product of small matrices [..., m, k] and [..., k, n], in full float32 (no matmul, so no TF32)."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


@full_precision
def quaternion_to_matrix(quaternion: Tensor, order: QuaternionOrder) -> Tensor:
    """Rotation of a quaternion of any non-zero length.

    Args:
        quaternion: [..., 4], scalar where `order` says; it is divided by its squared length, not normalised first.
        order: "xyzw" (VGGT) or "wxyz" (CUT3R, COLMAP).

    Returns:
        [..., 3, 3].
    """
    x, y, z, w = _scalar_last(quaternion, order).unbind(-1)
    s = 2.0 / (quaternion * quaternion).sum(-1)
    rows = (
        (1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)),
        (s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)),
        (s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


@full_precision
def matrix_to_quaternion(rotation: Tensor, order: QuaternionOrder) -> Tensor:
    """Unit quaternion of a rotation, w ≥ 0, by the best conditioned of the four formulae; differentiable.

    Args:
        rotation: [..., 3, 3].
        order: "xyzw" (VGGT) or "wxyz" (CUT3R, COLMAP).

    Returns:
        [..., 4].
    """
    check_trailing("rotation", rotation, 3, 3)
    m = [[rotation[..., i, j] for j in range(3)] for i in range(3)]
    xx, yy, zz = m[0][0], m[1][1], m[2][2]
    # Row k is 4·q_k·(x, y, z, w), so its own entry k is 4·q_k²: the row with the largest one loses no digits.
    xy, xz, yz = m[0][1] + m[1][0], m[0][2] + m[2][0], m[1][2] + m[2][1]
    xw, yw, zw = m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]
    rows = (
        (1 + xx - yy - zz, xy, xz, xw),
        (xy, 1 - xx + yy - zz, yz, yw),
        (xz, yz, 1 - xx - yy + zz, zw),
        (xw, yw, zw, 1 + xx + yy + zz),
    )
    candidates = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = candidates.take_along_dim(best[..., None, None], dim=-2).squeeze(-2)
    # Half over the root of the entry itself, not over the row's norm: on a matrix that is not quite a rotation the
    # references do it so, and a few of their float32 digits depend on it.
    quaternion = 0.5 * row / row.take_along_dim(best[..., None], dim=-1).sqrt()
    quaternion = torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
    return quaternion if order == "xyzw" else quaternion.roll(1, dims=-1)


@full_precision
def quaternion_multiply(a: Tensor, b: Tensor, order: QuaternionOrder) -> Tensor:
    """Hamilton product a·b [..., 4] (rotation b first, then a), its sign as it comes out."""
    ax, ay, az, aw = _scalar_last(a, order).unbind(-1)
    bx, by, bz, bw = _scalar_last(b, order).unbind(-1)
    product = (
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
        aw * bw - ax * bx - ay * by - az * bz,
    )
    result = torch.stack(product, dim=-1)
    return result if order == "xyzw" else result.roll(1, dims=-1)


def quaternion_conjugate(quaternion: Tensor, order: QuaternionOrder) -> Tensor:
    """[..., 4] with its vector part negated: the inverse of a unit quaternion."""
    w = _scalar_index(order)
    return torch.cat([q if k == w else -q for k, q in enumerate(quaternion.split(1, dim=-1))], dim=-1)


@full_precision
def axis_angle_to_matrix(axis_angle: Tensor) -> Tensor:
    """Rotation [..., 3, 3] about `axis_angle` [..., 3] by its length in radians (Rodrigues); smooth at zero."""
    check_trailing("axis_angle", axis_angle, 3)
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    rows = ((zero, -z, y), (z, zero, -x), (-y, x, zero))
    return torch.linalg.matrix_exp(torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2))


@full_precision
def rotation_angle(rotation: Tensor) -> Tensor:
    """Angle of a rotation [..., 3, 3] in radians, [0, π]; exact near 0 and π, where acos of the trace is not."""
    check_trailing("rotation", rotation, 3, 3)
    skew = rotation - rotation.mT
    sine = 0.5 * torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], dim=-1).norm(dim=-1)
    cosine = 0.5 * (rotation.diagonal(dim1=-2, dim2=-1).sum(-1) - 1)
    return torch.atan2(sine, cosine)


@full_precision
def nearest_rotation(matrix: Tensor) -> Tensor:
    """Rotation R, det +1, that maximises tr(Rᵀ M), [..., 3, 3]: special orthogonal Procrustes (Kabsch 1976)."""
    check_trailing("matrix", matrix, 3, 3)
    u, _, vt = svd_or_nan(matrix)
    signs = torch.ones_like(matrix[..., 0])
    signs[..., 2] = torch.linalg.det(multiply(u, vt)).sign()
    return multiply(u * signs[..., None, :], vt)


def svd_or_nan(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of [..., m, n]; NaN for a matrix that is not finite, where torch would raise for the whole batch."""
    finite = matrix.isfinite().all((-1, -2))[..., None]
    u, s, vt = torch.linalg.svd(torch.where(finite[..., None], matrix, 0.0))
    return torch.where(finite[..., None], u, torch.nan), torch.where(finite, s, torch.nan), vt


def _scalar_index(order: QuaternionOrder) -> int:
    if order not in ("xyzw", "wxyz"):
        raise ValueError(f"order: expected 'xyzw' or 'wxyz', got {order!r}")
    return order.index("w")


def _scalar_last(quaternion: Tensor, order: QuaternionOrder) -> Tensor:
    check_trailing("quaternion", quaternion, 4)
    return quaternion if _scalar_index(order) == 3 else quaternion.roll(-1, dims=-1)
