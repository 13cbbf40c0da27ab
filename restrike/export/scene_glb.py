"""A scene as a GLB file (glTF 2.0): the points, a frustum and a camera for each photo.

glTF's world has y up and z towards the viewer; ours, the first photo's camera, is turned by 180° about x for it, and
glTF's cameras are OpenGL's. Colours of vertices are linear there, so sRGB is decoded, to 16 bits for the dark ones.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restrike.export.scene import PhotoCameras, ScenePoints
from restrike.geometry import camera_centers, homogeneous, intrinsics_to_fov, invert_se3, to_opengl, unproject

_UP = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
_POINTS, _LINES = 0, 1  # kinds of primitives
_FLOAT, _UINT16, _UINT32 = 5126, 5123, 5125  # kinds of components
_FRUSTUM_SHARE = 0.05  # length of a frustum, of the scene's size
_EDGES = ((0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 1))


def write_glb(path: Path, cameras: PhotoCameras, points: ScenePoints) -> Path:
    """Write the file; Blender, three.js and trimesh read it."""
    file = _File()
    if len(points.points):
        position = file.add(_turned(points.points), _FLOAT, "VEC3", with_range=True)
        color = file.add(_linear(points.colors), _UINT16, "VEC4", normalized=True)
        file.add_mesh("points", {"POSITION": position, "COLOR_0": color}, _POINTS)
    corners = _frusta(cameras, _size_of(cameras, points))
    edges = np.array(_EDGES, np.uint32)[None] + 5 * np.arange(len(cameras), dtype=np.uint32)[:, None, None]
    position = file.add(_turned(corners.reshape(-1, 3)), _FLOAT, "VEC3", with_range=True)
    file.add_mesh("cameras", {"POSITION": position}, _LINES, file.add(edges.reshape(-1), _UINT32, "SCALAR"))
    poses = _UP @ homogeneous(to_opengl(cameras.world_to_camera.float()))
    for view, name in enumerate(cameras.names):
        height, width = cameras.sizes[view].tolist()
        fov = float(intrinsics_to_fov(cameras.intrinsics[view].float(), (height, width))[0])
        file.add_camera(name, fov, width / height, poses[view])
    path.write_bytes(file.packed())
    return path


class _File:
    """JSON and buffer of a GLB file, as they grow."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.content: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": "Restrike"},
            "scene": 0,
            "scenes": [{"nodes": []}],
            "nodes": [],
            "meshes": [],
            "cameras": [],
            "accessors": [],
            "bufferViews": [],
        }

    def add(self, values: np.ndarray, component: int, kind: str, with_range: bool = False, **more: Any) -> int:
        """An array as an accessor; returns its number."""
        raw = np.ascontiguousarray(values).tobytes()
        self.content["bufferViews"].append({"buffer": 0, "byteOffset": len(self.data), "byteLength": len(raw)})
        self.data += raw + b"\0" * (-len(raw) % 4)
        accessor = {"bufferView": len(self.content["bufferViews"]) - 1, "componentType": component, "type": kind}
        accessor |= {"count": len(values), **more}
        if with_range:
            accessor |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
        self.content["accessors"].append(accessor)
        return len(self.content["accessors"]) - 1

    def add_mesh(self, name: str, attributes: dict[str, int], mode: int, indices: int | None = None) -> None:
        """A primitive in a mesh and a node of its own."""
        primitive: dict[str, Any] = {"attributes": attributes, "mode": mode}
        if indices is not None:
            primitive["indices"] = indices
        self.content["meshes"].append({"name": name, "primitives": [primitive]})
        self._add_node({"name": name, "mesh": len(self.content["meshes"]) - 1})

    def add_camera(self, name: str, fov: float, aspect: float, pose: Tensor) -> None:
        """A camera that looks along its -z; `pose` [4, 4] is camera to world."""
        perspective = {"yfov": fov, "aspectRatio": aspect, "znear": 0.01}
        self.content["cameras"].append({"name": name, "type": "perspective", "perspective": perspective})
        matrix = pose.T.flatten().tolist()  # column by column
        self._add_node({"name": name, "camera": len(self.content["cameras"]) - 1, "matrix": matrix})

    def packed(self) -> bytes:
        """The file's bytes."""
        content = self.content | {"buffers": [{"byteLength": len(self.data)}]}
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(self.data), b"BIN\0")
        return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks) + len(self.data)) + chunks + bytes(self.data)

    def _add_node(self, node: dict[str, Any]) -> None:
        self.content["scenes"][0]["nodes"].append(len(self.content["nodes"]))
        self.content["nodes"].append(node)


def _turned(points: Tensor) -> np.ndarray:
    return (points.float() * torch.tensor([1.0, -1.0, -1.0])).numpy().astype("<f4")


def _linear(colors: Tensor) -> np.ndarray:
    """sRGB uint8 [N, 3] to linear uint16 [N, 4], opaque."""
    srgb = colors.numpy().astype(np.float64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    opaque = np.concatenate([linear, np.ones((len(linear), 1))], axis=1)
    return np.round(opaque * 65535).astype("<u2")


def _size_of(cameras: PhotoCameras, points: ScenePoints) -> float:
    places = torch.cat([camera_centers(cameras.world_to_camera.float()), points.points])
    spread = (places - places.median(0).values).norm(dim=-1)
    return float(spread.sort().values[int(0.9 * (len(spread) - 1))]) or 1.0


def _frusta(cameras: PhotoCameras, size: float) -> Tensor:
    """[V, 5, 3]: centre, and the photo's corners at a share of the scene's size."""
    height, width = cameras.sizes.float().unbind(-1)
    zero = torch.zeros_like(width)
    corners = torch.stack(
        [torch.stack(xy, -1) for xy in ((zero, zero), (width, zero), (width, height), (zero, height))]
    )
    to_world = invert_se3(cameras.world_to_camera.float())
    depth = torch.full((len(cameras), 4), _FRUSTUM_SHARE * size)
    ends = unproject(corners.transpose(0, 1), depth, cameras.intrinsics.float(), to_world)
    return torch.cat([to_world[:, None, :, 3], ends], dim=1)
