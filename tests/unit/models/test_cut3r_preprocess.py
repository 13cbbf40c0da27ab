"""Image files as CUT3R's evaluation loads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from restrike.models.cut3r.preprocess import fit_view, load_views


def picture(width: int, height: int) -> Image.Image:
    ramp = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (height, width, 3))
    return Image.fromarray(np.ascontiguousarray(ramp))


@pytest.mark.parametrize(
    "given, size, mode, want",
    [
        ((1000, 750), 512, "crop", (384, 512)),
        ((750, 1000), 512, "crop", (512, 384)),
        ((1000, 700), 512, "crop", (352, 512)),
        ((1000, 700), 512, "resize", (352, 512)),
        ((300, 300), 512, "crop", (384, 512)),
        ((300, 300), 512, "resize", (384, 512)),
        ((640, 480), 224, "crop", (224, 224)),
        ((100, 300), 224, "crop", (224, 224)),
    ],
)
def test_sides_become_multiples_of_a_patch(given, size, mode, want):
    out = fit_view(picture(*given), size, mode)
    assert tuple(out.shape) == (3, *want)
    assert float(out.min()) >= -1 and float(out.max()) <= 1


def test_crops_are_about_the_centre():
    out = fit_view(picture(640, 480), 224)
    assert abs(float(out.mean())) < 0.02
    assert float(out[:, :, -1].mean()) < 0.8  # the sides are cut off


def test_files_of_one_shape_are_stacked_and_others_are_refused(tmp_path):
    for name, size in (("a", (64, 48)), ("b", (64, 48)), ("c", (48, 64))):
        picture(*size).save(tmp_path / f"{name}.png")
    assert load_views([tmp_path / "a.png", tmp_path / "b.png"], 64).shape == (2, 3, 48, 64)
    assert torch.equal(load_views([tmp_path / "a.png"], 64)[0], fit_view(picture(64, 48), 64))
    with pytest.raises(ValueError, match=r"one shape.*c.png is \[64, 48\]"):
        load_views([tmp_path / "a.png", tmp_path / "c.png"], 64)
    (tmp_path / "d.png").write_bytes(b"no picture")
    for files, mode, message in (
        ([], "crop", "at least one"),
        (["a.png"], "fill", "mode"),
        (["d.png"], "crop", "d.png"),
    ):
        with pytest.raises(ValueError, match=message):
            load_views([tmp_path / file for file in files], mode=mode)
