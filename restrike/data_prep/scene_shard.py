"""What every packer of multi-view shards shares: frames to members, samples to a tar that is written whole or again."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np
from PIL import Image

from restrike.data.catalogue import ShardEntry
from restrike.data.depth_png import encode_depth, encode_mask_pair
from restrike.data.files import sha256_file, write_atomically
from restrike.data.index import index_path
from restrike.data.multiview_index import PackedFrame, build_scene_index
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.shard_writer import FinishedRecord, finished, record_path

SHORT_SIDES: dict[str, int | None] = {"S": 384, "L": 640, "full": None}
FOREGROUND_THRESHOLD = 0.4  # RayDiffusion's, for boxes
_JPEG_QUALITY = 95


class FrameProblem(NamedTuple):
    """A frame that cannot be used, and why."""

    sequence: str
    frame_number: int
    reason: str

    def __str__(self) -> str:
        return f"sequence '{self.sequence}', frame {self.frame_number}: {self.reason}"


class SceneShardRecord(FinishedRecord, frozen=True):
    """A finished shard of scenes. Problems are (sequence, frame, reason)."""

    frames: int
    redacted: int
    left_out: list[FrameProblem]
    without_depth: list[FrameProblem]


class FramePixels(NamedTuple):
    """A frame to pack, at its own size.

    Attributes:
        image_file: bytes of a JPEG that holds `image`; None = to be encoded.
        image: uint8 [H, W, 3].
        depth: float32 [P, Q], 0 = unknown; already of the stored size, or resized to it (nearest).
        depth_mask: bool, of the depth's size.
        foreground: uint8 [P, Q], 255 = certainly the object.
        world_to_camera: [3, 4], OpenCV axes; None = unknown.
        intrinsics: [3, 3], pixels of `image`.
    """

    image_file: bytes | None
    image: np.ndarray
    depth: np.ndarray
    depth_mask: np.ndarray
    foreground: np.ndarray
    world_to_camera: np.ndarray | None
    intrinsics: np.ndarray


def keep_or_write(
    target: Path, fingerprint: Callable[[], str], write: Callable[[str], SceneShardRecord]
) -> tuple[SceneShardRecord, bool]:
    """The record of a shard that an earlier run finished from the same input (True), or of the one written now.

    Raises:
        PrepareError: no space, or a write that failed.
    """
    try:
        mark = fingerprint()
        record = finished(target, mark, SceneShardRecord)
        if record is not None:
            return record, True
        record = write(mark)
        write_atomically(record_path(target), msgspec.json.encode(record))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PrepareError(
                f"no space left in {target.parent} while writing {target.name}; make room and run the same "
                "command again: finished shards are kept"
            ) from error
        raise PrepareError(f"{target.name}: {error}") from error
    return record, False


def write_tar(target: Path, samples: Iterable[dict[str, Any]]) -> ShardEntry | None:
    """Write tar and index of webdataset samples; None where there is no sample (then nothing is left behind)."""
    from webdataset import TarWriter  # slow to import

    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    # Nothing of this machine or hour gets in: equal data give equal bytes.
    options: dict[str, Any] = {"user": "restrike", "group": "restrike", "mtime": 0, "compress": False, "encoder": False}
    count = 0
    try:
        with open(partial, "wb") as file:
            with TarWriter(file, **options) as writer:
                for sample in samples:
                    writer.write(sample)
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        if not count:
            return None
        index = build_scene_index(partial)  # reads back what was written
        index.save(index_path(target))
        entry = ShardEntry(
            target.name, len(index), index.tar_bytes, sha256_file(partial), sha256_file(index_path(target))
        )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return entry


def pack_frame(
    number: int, name: str, timestamp: float, pixels: FramePixels, short_side: int | None
) -> tuple[PackedFrame, dict[str, bytes]]:
    """A frame's entry in `.seq.json` and its three members, shrunk so that the short side has at most so many pixels.

    Args:
        number: of the frame within its sequence.
        name: where it came from.
        timestamp: seconds.
        pixels: the frame.
        short_side: None = as it is.
    """
    height, width = pixels.image.shape[:2]
    size = stored_size((height, width), short_side)
    image_file = pixels.image_file
    if image_file is None or size != (height, width):
        image_file = encode_jpeg(pixels.image, size)
    depth = _nearest(np.where(np.isfinite(pixels.depth), pixels.depth, 0), size)
    depth_mask = _nearest(pixels.depth_mask.astype(np.uint8), size) > 0
    foreground = pixels.foreground
    if foreground.shape != size:
        foreground = cv2.resize(foreground, size[::-1], interpolation=cv2.INTER_AREA)
    scale_y, scale_x = size[0] / height, size[1] / width  # pixels count from the image's corner: K scales whole
    intrinsics = pixels.intrinsics
    about = PackedFrame(
        number=number,
        name=name,
        timestamp=timestamp,
        original_size=(height, width),
        size=size,
        world_to_camera=[] if pixels.world_to_camera is None else pixels.world_to_camera.ravel().tolist(),
        intrinsics=(
            float(intrinsics[0, 0] * scale_x), float(intrinsics[1, 1] * scale_y),
            float(intrinsics[0, 2] * scale_x), float(intrinsics[1, 2] * scale_y),
        ),
        box=foreground_box(foreground),
        has_depth=bool((depth > 0).any()),
    )  # fmt: skip
    members = {
        "depth.png": encode_depth(depth),
        "jpg": image_file,
        "mask.png": encode_mask_pair(foreground, depth_mask),
    }
    return about, members


def stored_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(H, W) at which a profile keeps an image: never larger than it is."""
    if short_side is None or min(size) <= short_side:
        return size
    scale = short_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def foreground_box(foreground: np.ndarray) -> tuple[int, int, int, int]:
    """Tight box (left, top, right, bottom), ends exclusive, of uint8 > 0.4 * 255; zeros where there is none."""
    rows, columns = np.nonzero(foreground > 255 * FOREGROUND_THRESHOLD)
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def encode_jpeg(image: np.ndarray, size: tuple[int, int]) -> bytes:
    """uint8 [H, W, 3] as a JPEG of (H, W) = `size`."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _nearest(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Depth is never averaged: a mean over an edge lies on no surface. Samples at pixel centres."""
    if pixels.shape == size:
        return pixels
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def stamp(path: Path) -> str:
    """Name, size and time of a file, which stand for its content in a fingerprint."""
    try:
        stat = os.stat(path)
    except OSError:
        return f"{path.name} missing"
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns}"
