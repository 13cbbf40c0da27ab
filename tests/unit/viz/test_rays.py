"""Sheets of rays."""

from __future__ import annotations

import numpy as np
import torch

from restrike.geometry import encode_rays
from restrike.viz.rays import ray_sheet


def test_a_sheet_has_a_column_a_view_and_true_colours_where_the_prediction_is_right():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, 4, 4, 3, generator=generator)
    rays = encode_rays(torch.randn(3, 1, 1, 3, generator=generator).expand_as(points), points)
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=generator, dtype=torch.uint8)
    sheet = np.asarray(ray_sheet(images, rays, rays, tile=16))
    assert sheet.shape == (5 * 20, 3 * 20, 3)
    rows = sheet.reshape(5, 20, 60, 3)
    assert (rows[1] == rows[2]).all() and (rows[3] == rows[4]).all() and not (rows[1] == rows[3]).all()


def test_points_at_infinity_and_nan_are_drawn_too():
    rays = torch.zeros(2, 8, 4, 4)
    rays[1] = float("nan")
    true = encode_rays(torch.zeros(2, 4, 4, 3), torch.rand(2, 4, 4, 3))
    assert ray_sheet(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), rays, true, tile=8).size == (2 * 12, 5 * 12)
