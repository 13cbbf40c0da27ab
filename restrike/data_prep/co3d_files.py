"""The files of a CO3D frame: image, depth, masks; and a sequence's point cloud. Paths never leave the root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from restrike.data.decode import DecodeError, decode_rgb
from restrike.data.depth_png import decode_depth, decode_mask
from restrike.data_prep.co3d_annotations import FrameAnnotation

_PLY_TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "uchar": "u1", "uint8": "u1", "int": "<i4"}


@dataclass(frozen=True)
class FrameFiles:
    """A frame's files, decoded.

    Attributes:
        image_file: bytes of the JPEG.
        image: uint8 [H, W, 3].
        depth: float32 [H, W] of the depth file's own size, 0 = unknown.
        depth_mask: bool, of the depth's size; True where depth agrees over views.
        foreground: uint8 [H, W], 255 = certainly the object.
    """

    image_file: bytes
    image: np.ndarray
    depth: np.ndarray
    depth_mask: np.ndarray
    foreground: np.ndarray


def read_frame(root: Path, frame: FrameAnnotation) -> FrameFiles:
    """Read and check a frame that is not redacted.

    Raises:
        DecodeError: a file is missing, damaged, or of another size than annotated; names the file.
    """
    assert frame.depth is not None and frame.mask is not None
    image_file = read_inside(root, frame.image.path)
    image = _named(frame.image.path, decode_rgb, image_file)
    if image.shape[:2] != frame.image.size:
        raise DecodeError(f"{frame.image.path}: {list(image.shape[:2])} pixels, annotated as {list(frame.image.size)}")
    scale = frame.depth.scale_adjustment
    depth = _named(frame.depth.path, lambda data: decode_depth(data, scale), read_inside(root, frame.depth.path))
    _check_shape(frame.depth.path, depth, image)
    depth_mask = np.ones(depth.shape, dtype=bool)
    if frame.depth.mask_path is not None:
        depth_mask = _named(frame.depth.mask_path, decode_mask, read_inside(root, frame.depth.mask_path)) > 128
        if depth_mask.shape != depth.shape:
            raise DecodeError(f"{frame.depth.mask_path}: {list(depth_mask.shape)} pixels, depth {list(depth.shape)}")
    foreground = _named(frame.mask.path, decode_mask, read_inside(root, frame.mask.path))
    _check_shape(frame.mask.path, foreground, image)
    return FrameFiles(image_file, image, depth, depth_mask, foreground)


def read_inside(root: Path, name: str) -> bytes:
    """A file by its annotated path. Raises DecodeError: outside the root, missing, or unreadable."""
    if name.startswith(("/", "\\")) or ".." in Path(name).parts:
        raise DecodeError(f"{name}: this path leads out of the data set; refused")
    try:
        return (root / name).read_bytes()
    except OSError as error:
        raise DecodeError(f"{name}: {error.strerror or error}") from None


def read_point_cloud(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Vertices of a binary little-endian PLY, CO3D's `pointcloud.ply`.

    Returns:
        points float32 [N, 3] in world units, colours uint8 [N, 3] or None.

    Raises:
        ValueError: another kind of file, or truncated; names it.
    """
    data = path.read_bytes()
    head, mark, body = data.partition(b"end_header\n")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    if not mark or lines[:1] != [["ply"]] or ["format", "binary_little_endian", "1.0"] not in lines:
        raise ValueError(f"{path}: expected a binary little-endian PLY file")
    elements = [number for number, line in enumerate(lines) if line[:1] == ["element"]]
    if not elements or lines[elements[0]][1] != "vertex":
        raise ValueError(f"{path}: the first element is not 'vertex'")
    end = elements[1] if len(elements) > 1 else len(lines)
    properties = [line for line in lines[elements[0] : end] if line[:1] == ["property"]]
    if unknown := [line for line in properties if line[1] not in _PLY_TYPES]:
        raise ValueError(f"{path}: cannot read vertices with {' '.join(unknown[0])}")
    layout = np.dtype([(line[2], _PLY_TYPES[line[1]]) for line in properties])
    count = int(lines[elements[0]][2])
    if len(body) < count * layout.itemsize:
        raise ValueError(f"{path}: truncated: {len(body)} bytes for {count} vertices of {layout.itemsize} bytes")
    vertices = np.frombuffer(body, layout, count)
    points = np.stack([vertices[axis] for axis in "xyz"], axis=-1).astype(np.float32)
    names = ("red", "green", "blue")
    has_color = set(names) <= set(layout.names or ())
    return points, np.stack([vertices[name] for name in names], axis=-1) if has_color else None


def _named(name: str, decode: Callable[[bytes], np.ndarray], data: bytes) -> np.ndarray:
    try:
        return decode(data)
    except DecodeError as error:
        raise DecodeError(f"{name}: {error}") from None


def _check_shape(name: str, pixels: np.ndarray, image: np.ndarray) -> None:
    """Other sizes are allowed (each is resized to the image's), other shapes are not."""
    (height, width), (image_height, image_width) = pixels.shape, image.shape[:2]
    if abs(height * image_width - width * image_height) > max(width, height) * 2:
        raise DecodeError(f"{name}: {[height, width]} pixels do not fit the image's {[image_height, image_width]}")
