"""A scene for notebooks: cameras.npz of all photos, and one file a photo with its depth and confidence.

One file a photo, so that neither the writer nor the reader needs memory for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from restrike.export.scene import PhotoCameras


def write_cameras_npz(path: Path, cameras: PhotoCameras, sources: Sequence[str], views: Sequence[str]) -> Path:
    """Arrays names, sources (the given photos' names), views (the files of `write_view_npz`), sizes (H, W), intrinsics
    and world_to_camera."""
    np.savez(
        path,
        names=np.array(list(cameras.names)),
        sources=np.array(list(sources)),
        views=np.array(list(views)),
        sizes=cameras.sizes.numpy(),
        intrinsics=cameras.intrinsics.float().numpy(),
        world_to_camera=cameras.world_to_camera.float().numpy(),
    )
    return path


def write_view_npz(path: Path, depth: Tensor, confidence: Tensor | None, crop_box: Tensor) -> Path:
    """Arrays depth [P, Q] (z-depth), confidence [P, Q] where there is one, and crop_box [4]: (left, top, right, bottom)
    of the map in pixels of the photo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"depth": depth.float().numpy(), "crop_box": crop_box.float().numpy()}
    if confidence is not None:
        arrays["confidence"] = confidence.float().numpy()
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path
