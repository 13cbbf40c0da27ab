"""A scene as nerfstudio's transforms.json: OpenGL cameras (x right, y up, z backward), each frame with its own lens."""

from __future__ import annotations

import json
from pathlib import Path

from restrike.export.scene import PhotoCameras
from restrike.geometry import homogeneous, split_intrinsics, to_opengl


def write_transforms(path: Path, cameras: PhotoCameras, images: str = "images", points: str | None = None) -> Path:
    """Write the file.

    Args:
        path: Of the file; other paths in it are relative to its folder.
        cameras: Of the photos.
        images: Folder of the photos.
        points: A PLY file, from which nerfstudio's splatfacto starts.
    """
    matrices = homogeneous(to_opengl(cameras.world_to_camera.double())).tolist()
    focal, center = (x.tolist() for x in split_intrinsics(cameras.intrinsics.double()))
    frames = [
        {
            "file_path": f"{images}/{name}",
            "w": width,
            "h": height,
            "fl_x": focal[view][0],
            "fl_y": focal[view][1],
            "cx": center[view][0],
            "cy": center[view][1],
            "transform_matrix": matrices[view],
        }
        for view, (name, (height, width)) in enumerate(zip(cameras.names, cameras.sizes.tolist(), strict=True))
    ]
    content = {"camera_model": "PINHOLE"} | ({"ply_file_path": points} if points else {}) | {"frames": frames}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
