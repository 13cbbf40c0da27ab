"""CO3D's annotation files, typed: what Restrike reads of them, unknown keys ignored, redacted (null) fields accepted.

Two traps of the genuine files: `frame_number` counts within a sequence and is *not* the number in the image's file
name, and an absent `intrinsics_format` means `ndc_norm_image_bounds`, though v2 writes `ndc_isotropic`. A frame is
known by (sequence_name, frame_number). Format: Reizenstein et al. 2021, and the co3d repository's dataclasses.
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import TypeVar

import msgspec

from restrike.data_prep.errors import PrepareError

FETCH_AGAIN = "fetch this file again (release co3dv2_231130)"


class Viewpoint(msgspec.Struct, frozen=True):
    """PyTorch3D camera (row vectors, x left, y up): R [3, 3], T [3]; NDC focal length and principal point [2]."""

    R: tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
    T: tuple[float, float, float]
    focal_length: tuple[float, float]
    principal_point: tuple[float, float]
    intrinsics_format: str = "ndc_norm_image_bounds"


class ImageFile(msgspec.Struct, frozen=True):
    """Path relative to the root, size (H, W)."""

    path: str
    size: tuple[int, int]


class DepthFile(msgspec.Struct, frozen=True):
    """Depth map, its scale, and the mask of depth that is consistent over views."""

    path: str
    scale_adjustment: float = 1.0
    mask_path: str | None = None


class MaskFile(msgspec.Struct, frozen=True):
    """Foreground probability."""

    path: str
    mass: float | None = None


class FrameAnnotation(msgspec.Struct, frozen=True):
    """One frame. Depth, mask and viewpoint are null in the redacted test frames of the challenge."""

    sequence_name: str
    frame_number: int
    image: ImageFile
    frame_timestamp: float | None = None
    depth: DepthFile | None = None
    mask: MaskFile | None = None
    viewpoint: Viewpoint | None = None


class PointCloudFile(msgspec.Struct, frozen=True):
    """Binary PLY."""

    path: str
    quality_score: float | None = None
    n_points: int | None = None


class SequenceAnnotation(msgspec.Struct, frozen=True):
    """One sequence; a larger viewpoint_quality_score is better, 0.5 is everybody's bound."""

    sequence_name: str
    category: str
    point_cloud: PointCloudFile | None = None
    viewpoint_quality_score: float | None = None


T = TypeVar("T")


def read_frames(path: Path) -> list[FrameAnnotation]:
    """`frame_annotations.jgz`. Raises PrepareError: missing, damaged or of another form; names file and entry."""
    return read_list(path, FrameAnnotation)


def read_sequences(path: Path) -> list[SequenceAnnotation]:
    """`sequence_annotations.jgz`. Raises PrepareError as `read_frames`."""
    return read_list(path, SequenceAnnotation)


def read_list(path: Path, kind: type[T]) -> list[T]:
    """A gzipped JSON list of entries of one kind."""
    data = read_gzip(path)
    try:
        return msgspec.json.decode(data, type=list[kind])  # type: ignore[valid-type]
    except msgspec.DecodeError as fast_error:
        # Python's json writes NaN and Infinity, which are no JSON: such files still read, and their frames are judged.
        try:
            entries = json.loads(data)
        except (ValueError, UnicodeDecodeError):
            raise PrepareError(f"{path}: not JSON ({fast_error}); {FETCH_AGAIN}") from None
    if not isinstance(entries, list):
        raise PrepareError(f"{path}: expected a list, got {type(entries).__name__}; {FETCH_AGAIN}")
    return [_convert(entry, kind, path, number) for number, entry in enumerate(entries)]


def _convert(entry: object, kind: type[T], path: Path, number: int) -> T:
    try:
        return msgspec.convert(entry, type=kind, strict=False)
    except msgspec.ValidationError as error:
        name = f"sequence '{entry.get('sequence_name')}'" if isinstance(entry, dict) else "no object"
        frame = f", frame {entry['frame_number']}" if isinstance(entry, dict) and "frame_number" in entry else ""
        raise PrepareError(f"{path}: entry {number} ({name}{frame}): {error}; {FETCH_AGAIN}") from None


def read_gzip(path: Path) -> bytes:
    """The content of a .jgz file. Raises PrepareError: missing, or damaged."""
    try:
        return gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise PrepareError(
            f"{path} is missing; fetch the category's annotations, or drop it with --categories"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise PrepareError(f"{path}: damaged gzip file ({error}); {FETCH_AGAIN}") from None


def read_json(path: Path, kind: type[T]) -> T:
    """A JSON file of one type. Raises PrepareError: missing, or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise PrepareError(f"{path}: {error.strerror or error}; {FETCH_AGAIN}") from None
    except msgspec.DecodeError as error:
        raise PrepareError(f"{path}: {error}; {FETCH_AGAIN}") from None
