"""A frame of one's own data, whatever layout it comes from: picture, lens, camera, depth and mask, read to pixels.

Photographs bring two things that CO3D does not: lenses with distortion, which are undistorted here since every model
wants pinholes, and EXIF orientation, which is applied exactly where the camera's size says so.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

from restrike.data.decode import DecodeError, decode_rgb, jpeg_size
from restrike.data_prep.co3d_files import read_inside
from restrike.data_prep.scene_shard import FramePixels, stored_size

DEPTH_RANGE = (1e-3, 3e4)  # scene units that half floats hold to a thousandth
_ORIENTATION = 0x0112
_SAME_ASPECT = 2.0  # pixels by which a scaled picture may miss its camera's aspect


class Lens(NamedTuple):
    """A camera's picture size (H, W), intrinsics [3, 3] in pixels (corner origin), and OpenCV's k1, k2, p1, p2."""

    size: tuple[int, int]
    intrinsics: np.ndarray
    distortion: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


class DepthFile(NamedTuple):
    """A depth map: path inside the scene, and scene units per count of an integer PNG (1 for floats)."""

    path: str
    unit: float


@dataclass(frozen=True)
class OwnFrame:
    """One picture of a scene.

    Attributes:
        path: of the picture, relative to the scene's folder.
        lens: of its camera.
        world_to_camera: float64 [3, 4], OpenCV axes; None = unknown.
        depth: a depth map, or world points [N, 3] that this picture saw, or None.
        mask: a picture of the object (white), relative to the folder; None = all of it.
        part: "train", "val" or "test" where the layout says so.
    """

    path: str
    lens: Lens
    world_to_camera: np.ndarray | None = None
    depth: DepthFile | np.ndarray | None = None
    mask: str | None = None
    part: str | None = None


@dataclass(frozen=True)
class OwnScene:
    """Pictures of one scene, by path; `files` are those that the cameras were read from."""

    name: str
    root: Path
    layout: str
    frames: list[OwnFrame]
    files: list[Path]

    @property
    def has_cameras(self) -> bool:
        return all(frame.world_to_camera is not None for frame in self.frames)


def read_pixels(scene: OwnScene, frame: OwnFrame, short_side: int | None = None, scale: float = 1.0) -> FramePixels:
    """Read and check a frame; depth from points is drawn at the size that `short_side` gives.

    Args:
        scene: that the frame belongs to.
        frame: to read.
        short_side: pixels; None = as it is.
        scale: factor of the whole scene, cameras and depth.

    Raises:
        DecodeError: a file is missing, damaged, or does not fit its camera; names it.
    """
    data = read_inside(scene.root, frame.path)
    image, is_turned = _read_image(data, frame)
    size = (image.shape[0], image.shape[1])
    intrinsics = _scaled(frame.lens.intrinsics, frame.lens.size, size)
    depth: np.ndarray = np.zeros(size, np.float32)
    foreground = np.full(size, 255, np.uint8) if frame.mask is None else _read_mask(scene.root, frame.mask, size)
    if isinstance(frame.depth, DepthFile):
        depth = _fit(_read_depth(scene.root, frame.depth) * np.float32(scale), size, frame.depth.path)
    if any(frame.lens.distortion):
        maps, intrinsics = _undistortion(frame.lens, intrinsics, size)
        image = cv2.remap(image, *maps, cv2.INTER_LINEAR)
        depth, foreground = (cv2.remap(pixels, *maps, cv2.INTER_NEAREST) for pixels in (depth, foreground))
    if isinstance(frame.depth, np.ndarray) and frame.world_to_camera is not None:
        stored = stored_size(size, short_side)
        depth = scale * draw_points(frame.depth, _scaled(intrinsics, size, stored), frame.world_to_camera, stored)
    _check_depth(depth, frame)
    is_kept = not is_turned and not any(frame.lens.distortion) and jpeg_size(data) is not None
    camera = frame.world_to_camera
    if camera is not None:
        camera = np.concatenate([camera[:, :3], scale * camera[:, 3:]], axis=1)
    return FramePixels(data if is_kept else None, image, depth, depth > 0, foreground, camera, intrinsics)


def draw_points(
    points: np.ndarray, intrinsics: np.ndarray, world_to_camera: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Depth [H, W] of world points [N, 3], each in one pixel, the nearest on top; 0 elsewhere."""
    camera = points @ world_to_camera[:, :3].T + world_to_camera[:, 3]
    camera = camera[camera[:, 2] > 0]
    pixels = camera @ intrinsics.T
    cells = np.floor(pixels[:, :2] / pixels[:, 2:]).astype(np.int64)
    inside = ((cells >= 0) & (cells < (size[1], size[0]))).all(-1)
    depth = np.full(size, np.inf)
    np.minimum.at(depth, (cells[inside, 1], cells[inside, 0]), camera[inside, 2])
    return np.where(np.isfinite(depth), depth, 0).astype(np.float32)


def _scaled(intrinsics: np.ndarray, size: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Intrinsics of a picture after a resize; pixels count from its corner."""
    return np.diag([target[1] / size[1], target[0] / size[0], 1.0]) @ intrinsics


def _read_image(data: bytes, frame: OwnFrame) -> tuple[np.ndarray, bool]:
    """The picture the way up in which its camera saw it; True where EXIF's orientation had to be applied."""
    try:
        image = decode_rgb(data)
    except DecodeError as error:
        raise DecodeError(f"{frame.path}: {error}") from None
    if _fits((image.shape[0], image.shape[1]), frame.lens.size) and not _is_upside_down(data, frame):
        return image, False
    turned = upright_image(data)
    if turned is not None and _fits((turned.shape[0], turned.shape[1]), frame.lens.size):
        return turned, True
    raise DecodeError(
        f"{frame.path}: {list(image.shape[:2])} pixels, its camera has {list(frame.lens.size)}; give the pictures that "
        "the cameras were made from (--images), or make the cameras again"
    )


def _is_upside_down(data: bytes, frame: OwnFrame) -> bool:
    """A photo without cameras is turned by any orientation; cameras were fitted to pixels as they are stored."""
    return frame.world_to_camera is None and exif_orientation(data) != 1


def exif_orientation(data: bytes) -> int:
    """EXIF's orientation, 1 = as stored."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's plug-ins raise a dozen types on damaged metadata, which says nothing about the pixels
        return 1


def upright_image(data: bytes) -> np.ndarray | None:
    """uint8 [H, W, 3] after EXIF's orientation; None where there is none to apply."""
    if exif_orientation(data) == 1:
        return None
    with Image.open(io.BytesIO(data)) as picture:
        return np.array(ImageOps.exif_transpose(picture).convert("RGB"))


def _fits(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Whether a picture is its camera's, perhaps at another scale."""
    return abs(size[0] * wanted[1] - size[1] * wanted[0]) <= _SAME_ASPECT * max(wanted)


def _fit(pixels: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    if not _fits((pixels.shape[0], pixels.shape[1]), size):
        raise DecodeError(f"{name}: {list(pixels.shape)} pixels do not fit the picture's {list(size)}")
    if pixels.shape == size:
        return pixels
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def _read_mask(root: Path, name: str, size: tuple[int, int]) -> np.ndarray:
    try:
        mask = decode_rgb(read_inside(root, name))[..., 0]
    except DecodeError as error:
        raise DecodeError(f"{name}: {error}") from None
    return _fit(mask, size, name)


def _read_depth(root: Path, depth: DepthFile) -> np.ndarray:
    """float32 [H, W], 0 = unknown: integer PNG, `.npy`, or COLMAP's `.bin`."""
    data, suffix = read_inside(root, depth.path), Path(depth.path).suffix.lower()
    if suffix == ".npy":
        try:
            values = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DecodeError(f"{depth.path}: not a plain .npy array ({error})") from None
    elif suffix == ".bin":
        values = _colmap_depth(data, depth.path)
    elif suffix == ".png":
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
        if decoded is None or b"IEND" not in data[-16:]:
            raise DecodeError(f"{depth.path}: damaged or truncated PNG")
        values = decoded
    else:
        raise DecodeError(f"{depth.path}: depth as {suffix} is not read; convert it to 16-bit PNG or .npy")
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "fu":
        raise DecodeError(f"{depth.path}: expected one depth a pixel, got {values.dtype} {list(values.shape)}")
    unit = depth.unit if values.dtype.kind == "u" else 1.0
    metric = values.astype(np.float32) * np.float32(unit)
    return np.where(np.isfinite(metric) & (metric > 0), metric, 0).astype(np.float32)


def _colmap_depth(data: bytes, name: str) -> np.ndarray:
    """COLMAP's dense array: "width&height&channels&", then float32, column by column of the picture's rows."""
    parts = data.split(b"&", 3)
    try:
        width, height, channels = (int(part) for part in parts[:3])
        return np.frombuffer(parts[3], "<f4").reshape(channels, height, width)[0]
    except (ValueError, IndexError) as error:
        raise DecodeError(f"{name}: not a whole COLMAP depth map ({error}); run its stereo step again") from None


def _undistortion(
    lens: Lens, intrinsics: np.ndarray, size: tuple[int, int]
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Look-up maps of a pinhole picture of the same size without empty borders, and its intrinsics."""
    shift = np.zeros((3, 3))
    shift[:2, 2] = 0.5  # OpenCV counts from the first pixel's centre
    source, distortion = intrinsics - shift, np.array(lens.distortion)
    pinhole, _ = cv2.getOptimalNewCameraMatrix(source, distortion, size[::-1], 0, size[::-1])
    maps = cv2.initUndistortRectifyMap(source, distortion, None, pinhole, size[::-1], cv2.CV_32FC1)  # type: ignore[call-overload]
    return (maps[0], maps[1]), pinhole + shift


def _check_depth(depth: np.ndarray, frame: OwnFrame) -> None:
    known = depth[depth > 0]
    if len(known) and not DEPTH_RANGE[0] < (middle := float(np.median(known))) < DEPTH_RANGE[1]:
        raise DecodeError(
            f"{frame.path}: median depth {middle:.3g}, half floats hold {DEPTH_RANGE[0]:g} to {DEPTH_RANGE[1]:g} well; "
            "give --scale (of the scene) or --depth-unit (of PNG depth) so that it lies between"
        )
