from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multiview_cases import random_rotations
from restrike import geometry as g
from restrike.geometry.rotations import align_left

angles = st.floats(-math.pi, math.pi, allow_nan=False)
axis_angles = st.lists(angles, min_size=3, max_size=3).map(lambda x: torch.tensor(x, dtype=torch.float64))
orders = st.sampled_from(["xyzw", "wxyz"])


def rotations(seed: int, *shape: int) -> Tensor:
    return random_rotations(torch.Generator().manual_seed(seed), *shape)


@given(axis_angles, orders)
def test_quaternions_of_any_rotation_come_back_as_it(axis_angle: Tensor, order: str) -> None:
    rotation = g.axis_angle_to_matrix(axis_angle)
    quaternion = g.matrix_to_quaternion(rotation, order)
    assert quaternion[order.index("w")] >= 0
    torch.testing.assert_close(quaternion.norm(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(g.quaternion_to_matrix(quaternion, order), rotation)


@pytest.mark.parametrize("axis", [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [-1, 0, 1]])
def test_half_turns_have_a_well_conditioned_quaternion_in_float32(axis: list[int]) -> None:
    direction = torch.nn.functional.normalize(torch.tensor(axis).float(), dim=0)
    rotation = 2 * direction[:, None] * direction - torch.eye(3)
    back = g.quaternion_to_matrix(g.matrix_to_quaternion(rotation, "xyzw"), "xyzw")
    torch.testing.assert_close(back, rotation, atol=1e-6, rtol=0)


@given(st.integers(0, 10**6), st.floats(0.01, 100), orders)
def test_length_and_sign_of_a_quaternion_do_not_matter(seed: int, length: float, order: str) -> None:
    quaternion = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    want = g.quaternion_to_matrix(quaternion, order)
    torch.testing.assert_close(g.quaternion_to_matrix(-length * quaternion, order), want)


@given(st.integers(0, 10**6), orders)
def test_product_of_quaternions_is_the_product_of_rotations(seed: int, order: str) -> None:
    a, b = rotations(seed, 2, 3)
    product = g.quaternion_multiply(g.matrix_to_quaternion(a, order), g.matrix_to_quaternion(b, order), order)
    torch.testing.assert_close(g.quaternion_to_matrix(product, order), a @ b)
    inverse = g.quaternion_conjugate(g.matrix_to_quaternion(a, order), order)
    torch.testing.assert_close(g.quaternion_to_matrix(inverse, order), a.mT)


def test_quaternion_orders_are_what_they_say() -> None:
    quarter_turn_about_z = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(g.matrix_to_quaternion(quarter_turn_about_z, "xyzw"), torch.tensor([0, 0, half, half]))
    torch.testing.assert_close(g.matrix_to_quaternion(quarter_turn_about_z, "wxyz"), torch.tensor([half, 0, 0, half]))
    with pytest.raises(ValueError, match="xyzw"):
        g.quaternion_to_matrix(torch.ones(4), "xywz")  # type: ignore[arg-type]


@given(st.floats(0, math.pi), st.integers(0, 10**6))
def test_rotation_angle_is_the_length_of_the_axis_angle(angle: float, seed: int) -> None:
    axis = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation = g.axis_angle_to_matrix(angle * axis / axis.norm())
    torch.testing.assert_close(g.rotation_angle(rotation), torch.tensor(angle, dtype=torch.float64), atol=1e-7, rtol=0)


def test_tiny_angles_survive_float32() -> None:
    rotation = g.axis_angle_to_matrix(torch.tensor([1e-5, 0, 0]))
    assert g.rotation_angle(rotation).item() == pytest.approx(1e-5, rel=1e-4)  # acos of the trace would say 0


@given(st.integers(0, 10**6))
def test_nearest_rotation_is_proper_and_leaves_rotations_alone(seed: int) -> None:
    rotation = rotations(seed, 4)
    torch.testing.assert_close(g.nearest_rotation(3 * rotation), rotation)
    mirrored = g.nearest_rotation(-rotation)
    torch.testing.assert_close(torch.linalg.det(mirrored), torch.ones(4, dtype=torch.float64))


def test_one_matrix_that_is_not_finite_spoils_only_itself() -> None:
    matrices = rotations(0, 3)
    want = matrices.clone()
    matrices[1, 0, 0] = torch.nan
    got = g.nearest_rotation(matrices)
    assert got[1].isnan().all()
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]])


def test_rotate_aligns_leading_dimensions_from_the_left() -> None:
    matrix, vectors = rotations(0, 2, 3), torch.randn(2, 3, 4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(g.rotate(matrix, vectors), torch.einsum("bvij,bvhwj->bvhwi", matrix, vectors))
    with pytest.raises(ValueError, match=r"leading dimensions \[2, 3\]"):
        align_left(matrix, torch.randn(3, 2, 3))
    with pytest.raises(ValueError, match=r"vectors: expected shape \[..., 3\], got \[2, 4\]"):
        g.rotate(matrix[0], torch.randn(2, 4))


def test_autocast_does_not_reach_geometry() -> None:
    matrix = rotations(0, 8).float()
    vectors = torch.randn(8, 16, 3, generator=torch.Generator().manual_seed(0))
    want = g.rotate(matrix, vectors), g.nearest_rotation(matrix), g.multiply(matrix, matrix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = g.rotate(matrix, vectors), g.nearest_rotation(matrix), g.multiply(matrix, matrix)
        narrow = g.rotate(matrix.bfloat16(), vectors.bfloat16())
        product = g.full_precision(torch.matmul)(matrix, vectors.mT)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert narrow.dtype == torch.float32
    assert torch.equal(product, matrix @ vectors.mT)


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 10**6))
def test_gradients_of_rotations_equal_finite_differences(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    quaternion = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    axis_angle = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: g.quaternion_to_matrix(q, "wxyz"), quaternion)
    assert torch.autograd.gradcheck(g.axis_angle_to_matrix, axis_angle)
    assert torch.autograd.gradcheck(lambda a: g.matrix_to_quaternion(g.axis_angle_to_matrix(a), "xyzw"), axis_angle)
    assert torch.autograd.gradcheck(lambda a: g.rotation_angle(g.axis_angle_to_matrix(a)), axis_angle)
