"""A small ray-cast scene, and writers of the layouts in which people keep their own."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

from restrike.data.decode import decode_rgb
from restrike.data_prep.toy import _look_at
from restrike.data_prep.toy_scene import Scene, View, pyramid, render, stack_of_solids
from restrike.geometry import to_colmap, to_opengl
from restrike.viz.scene import SceneViews

SIZE = (72, 96)
MODEL_IDS = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "RADIAL": 3, "OPENCV": 4, "FULL_OPENCV": 6}


class Shot(NamedTuple):
    """uint8 [H, W, 3]; float32 [H, W]; bool [H, W]; [3, 4]."""

    image: np.ndarray
    depth: np.ndarray
    is_object: np.ndarray
    world_to_camera: np.ndarray


@lru_cache
def shots(count: int = 6, focal: tuple[float, float] = (100.0, 100.0), size: tuple[int, int] = SIZE) -> list[Shot]:
    """Neighbouring views of one scene, with the principal point at (50.5, 35) + half of what the size exceeds SIZE."""
    folder = resources.files("restrike.data_prep") / "assets" / "photos"
    textures = [pyramid(decode_rgb((folder / f"{name}.jpg").read_bytes())) for name in ("brick", "coffee", "chelsea")]
    random = np.random.default_rng(3)
    light = np.array([0.3, 0.2, 0.9])
    scene = Scene(stack_of_solids(random, "box", 3), 4.0, (0, 1, 2, 0, 1, 2), light / np.linalg.norm(light))
    center = 50.5 + (size[1] - SIZE[1]) / 2, 35.0 + (size[0] - SIZE[0]) / 2
    found = []
    for number in range(count):
        angle = 0.12 * number
        eye = np.array([2.6 * np.cos(angle), 2.6 * np.sin(angle), 1.3 + 0.05 * number])
        pose = _look_at(eye, np.array([0, 0, 0.4]), 0.05)
        picture = render(scene, View(pose, focal[0], center, size), textures)
        found.append(Shot(picture.image, picture.depth, picture.is_object, pose))
    return found


def intrinsics() -> np.ndarray:
    """Of `shots()`."""
    return np.array([[100.0, 0, 50.5], [0, 100.0, 35.0], [0, 0, 1]])


def toy_views(title: str) -> SceneViews:
    """`shots` as the drawing functions take them."""
    taken = shots()
    return SceneViews(
        title,
        [f"view {number}" for number in range(len(taken))],
        torch.from_numpy(np.stack([shot.image for shot in taken])).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.stack([shot.depth for shot in taken])),
        torch.from_numpy(intrinsics()).float().expand(len(taken), 3, 3),
        torch.from_numpy(np.stack([shot.world_to_camera for shot in taken])).float(),
        torch.from_numpy(np.stack([shot.is_object for shot in taken])),
    )


def distorted(model_params: tuple[float, float, float, float]) -> list[Shot]:
    """`shots` through a lens with OpenCV's k1, k2, p1, p2: pictures that are larger are resampled along bent rays."""
    large = shots(size=(SIZE[0] + 48, SIZE[1] + 64))
    u, v = np.meshgrid(np.arange(SIZE[1], dtype=np.float64), np.arange(SIZE[0], dtype=np.float64))
    source = intrinsics() - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    target = source + np.array([[0, 0, 32.0], [0, 0, 24.0], [0, 0, 0]])
    points = np.stack([u.ravel(), v.ravel()], axis=-1)[:, None]
    straight = cv2.undistortPoints(points, source, np.array(model_params), P=target).reshape(*SIZE, 2)
    maps = straight[..., 0].astype(np.float32), straight[..., 1].astype(np.float32)
    return [
        Shot(
            cv2.remap(shot.image, *maps, cv2.INTER_LINEAR),
            cv2.remap(shot.depth, *maps, cv2.INTER_NEAREST),
            cv2.remap(shot.is_object.astype(np.uint8), *maps, cv2.INTER_NEAREST) > 0,
            shot.world_to_camera,
        )
        for shot in large
    ]


def save_picture(path: Path, image: np.ndarray, orientation: int | None = None, focal_35mm: int | None = None) -> None:
    """With EXIF where asked for; the pixels are stored as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image)
    exif = picture.getexif()
    if orientation is not None:
        exif[0x0112] = orientation
    if focal_35mm is not None:
        exif.get_ifd(0x8769)[0xA405] = focal_35mm
    picture.save(path, quality=95, exif=exif)


def write_photos(folder: Path, pictures: Sequence[Shot]) -> Path:
    for number, shot in enumerate(pictures):
        save_picture(folder / f"IMG_{number:03d}.jpg", shot.image)
    return folder


def write_transforms(folder: Path, pictures: Sequence[Shot], is_per_frame: bool = False, depth: str = "png") -> Path:
    """As nerfstudio (`is_per_frame`: w, h, fl_x … in each frame) or instant-ngp (one camera_angle_x for all)."""
    frames = []
    for number, shot in enumerate(pictures):
        save_picture(folder / f"images/frame_{number:05d}.png", shot.image)
        entry: dict = {
            "file_path": f"./images/frame_{number:05d}.png",
            "transform_matrix": [
                *to_opengl(torch.from_numpy(shot.world_to_camera)).tolist(), [0.0, 0.0, 0.0, 1.0],
            ],
        }  # fmt: skip
        if is_per_frame:
            entry |= {"w": SIZE[1], "h": SIZE[0], "fl_x": 100.0, "fl_y": 100.0, "cx": 50.5, "cy": 35.0}
        if depth:
            entry["depth_file_path"] = f"depth/{number:05d}.{depth}"
            (folder / "depth").mkdir(exist_ok=True)
            if depth == "npy":
                np.save(folder / entry["depth_file_path"], shot.depth)
            else:
                cv2.imwrite(str(folder / entry["depth_file_path"]), np.round(1000 * shot.depth).astype(np.uint16))
        save_picture(folder / f"masks/{number:05d}.png", 255 * shot.is_object.astype(np.uint8))
        entry["mask_path"] = f"masks/{number:05d}.png"
        frames.append(entry)
    content: dict = {"frames": frames}
    if not is_per_frame:
        content |= {"camera_angle_x": 2 * np.arctan(0.5 * SIZE[1] / 100.0), "cx": 50.5, "cy": 35.0}
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


def visible_points(pictures: Sequence[Shot], every: int = 7) -> list[tuple[int, np.ndarray]]:
    """(picture, world point) of a grid of pixels of each picture."""
    points = []
    for number, shot in enumerate(pictures):
        rows, columns = np.mgrid[0 : SIZE[0] : every, 0 : SIZE[1] : every].reshape(2, -1)
        z = shot.depth[rows, columns].astype(np.float64)
        rays = np.stack([(columns + 0.5 - 50.5) / 100, (rows + 0.5 - 35.0) / 100, np.ones(len(rows))], axis=-1)
        world = (rays * z[:, None] - shot.world_to_camera[:, 3]) @ shot.world_to_camera[:, :3]
        points += [(number, point) for point in world]
    return points


def write_colmap(
    folder: Path,
    pictures: Sequence[Shot],
    is_binary: bool = True,
    model: str = "PINHOLE",
    params: Sequence[float] = (100.0, 100.0, 50.5, 35.0),
) -> Path:
    """images/ and sparse/0 with one camera; each picture saw the points that were taken from it."""
    for number, shot in enumerate(pictures):
        save_picture(folder / f"images/{number:03d}.jpg", shot.image)
    points = visible_points(pictures)
    poses = [to_colmap(torch.from_numpy(shot.world_to_camera), torch.from_numpy(intrinsics()))[:2] for shot in pictures]
    place = folder / "sparse" / "0"
    place.mkdir(parents=True)
    write = _write_binary if is_binary else _write_text
    write(place, [(q.tolist(), t.tolist()) for q, t in poses], points, model, list(params))
    return folder


def _write_binary(place: Path, poses: list, points: list, model: str, params: list[float]) -> None:
    cameras = struct.pack("<QiiQQ", 1, 7, MODEL_IDS[model], SIZE[1], SIZE[0]) + np.array(params, "<f8").tobytes()
    (place / "cameras.bin").write_bytes(cameras)
    data = struct.pack("<Q", len(poses))
    for number, (qvec, tvec) in enumerate(poses):
        own = [key for key, (owner, _) in enumerate(points) if owner == number]
        data += struct.pack("<i7di", number + 1, *qvec, *tvec, 7) + f"{number:03d}.jpg".encode() + b"\0"
        data += struct.pack("<Q", len(own) + 1) + struct.pack("<ddq", 1.0, 2.0, -1)
        data += b"".join(struct.pack("<ddq", 0.0, 0.0, key) for key in own)
    (place / "images.bin").write_bytes(data)
    data = struct.pack("<Q", len(points))
    for key, (owner, point) in enumerate(points):
        data += struct.pack("<Q3d3BdQii", key, *point, 1, 2, 3, 0.5, 1, owner + 1, 0)
    (place / "points3D.bin").write_bytes(data)


def _write_text(place: Path, poses: list, points: list, model: str, params: list[float]) -> None:
    line = " ".join(map(repr, params))
    (place / "cameras.txt").write_text(f"# Camera list\n7 {model} {SIZE[1]} {SIZE[0]} {line}\n")
    lines = ["# Image list"]
    for number, (qvec, tvec) in enumerate(poses):
        own = [key for key, (owner, _) in enumerate(points) if owner == number]
        lines.append(f"{number + 1} {' '.join(map(repr, [*qvec, *tvec]))} 7 {number:03d}.jpg")
        lines.append(" ".join(["1.0 2.0 -1", *(f"0.0 0.0 {key}" for key in own)]))
    (place / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [
        f"{key} {' '.join(map(repr, point.tolist()))} 1 2 3 0.5 {owner + 1} 0"
        for key, (owner, point) in enumerate(points)
    ]
    (place / "points3D.txt").write_text("\n".join(["# 3D point list", *rows]) + "\n")
