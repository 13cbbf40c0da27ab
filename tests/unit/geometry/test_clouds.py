from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from restrike import geometry as g


def cloud(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6), st.integers(1, 400), st.integers(1, 700), st.integers(1, 40))
def test_neighbours_equal_those_of_comparing_all_with_all(seed: int, n: int, m: int, k: int) -> None:
    queries, points = cloud(seed, n), cloud(seed + 1, m)
    k = min(k, m)
    got = g.nearest_neighbors(queries, points, k)
    want = (queries[:, None] - points).norm(dim=-1).topk(k, largest=False)
    torch.testing.assert_close(got.distances, want.values)
    assert torch.equal(got.indices, want.indices)


def test_every_box_is_visited_where_the_boxes_do_not_help() -> None:
    # All points at one distance from the query cluster: no bound can rule a box out.
    points = torch.nn.functional.normalize(cloud(0, 5000), dim=-1)
    points[4321] *= 0.99
    near = g.nearest_neighbors(0.001 * cloud(1, 70), points)
    assert (near.indices == 4321).float().mean() > 0.8
    want = (0.001 * cloud(1, 70)[:, None] - points).norm(dim=-1).amin(1)
    torch.testing.assert_close(near.distances[:, 0], want)


def test_repeated_points_and_distant_offsets_keep_exact_distances() -> None:
    points = cloud(0, 100).repeat(3, 1) + 1e6
    near = g.nearest_neighbors(points, points, 3)
    assert (near.distances == 0).all()
    assert near.indices.sort(dim=1).values.diff(dim=1).eq(100).all()


def test_clouds_that_cannot_be_searched_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 5"):
        g.nearest_neighbors(cloud(0, 3), cloud(0, 5), 6)
    with pytest.raises(ValueError, match="NaN or infinite"):
        g.nearest_neighbors(torch.full((2, 3), torch.nan), cloud(0, 5).float())
    assert g.nearest_neighbors(cloud(0, 0), cloud(0, 5)).distances.shape == (0, 1)


def test_normals_of_a_plane_stand_on_it() -> None:
    normal = torch.nn.functional.normalize(torch.tensor([1.0, -2, 0.5], dtype=torch.float64), dim=0)
    points = cloud(0, 200)
    points = points - (points @ normal)[:, None] * normal + 4 * normal
    cosine = (g.estimate_normals(points) @ normal).abs()
    torch.testing.assert_close(cosine, torch.ones(200, dtype=torch.float64))


def test_icp_brings_a_moved_cloud_home() -> None:
    target = cloud(0, 500)
    rotation = g.axis_angle_to_matrix(torch.tensor([0.02, -0.01, 0.03], dtype=torch.float64))
    move = g.make_se3(rotation, torch.tensor([0.02, 0.0, -0.03], dtype=torch.float64))
    fit = g.register_icp(g.transform_points(move, target), target, radius=0.3)
    home = g.compose_se3(fit.transform, move)
    torch.testing.assert_close(home, torch.eye(4, dtype=torch.float64)[:3], atol=1e-6, rtol=0)
    assert fit.fitness == 1


def test_icp_without_a_pair_in_reach_stays_where_it_is() -> None:
    fit = g.register_icp(cloud(0, 20), cloud(0, 20) + 100, radius=0.1)
    assert fit.fitness == 0
    assert torch.equal(fit.transform, torch.eye(4, dtype=torch.float64)[:3])
