"""The genuine CO3D v2 tree, category by category: sequences with their frames, cameras and splits, checked.

What a whole category needs and lacks is an error; what one frame lacks is a `FrameProblem`, so that whoever packs can
name, count and bound them. Redacted frames (null camera, depth or mask) are no problems: they are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from restrike.data_prep.co3d_annotations import (
    FrameAnnotation,
    SequenceAnnotation,
    Viewpoint,
    read_frames,
    read_json,
    read_sequences,
)
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.scene_shard import FrameProblem
from restrike.geometry import PyTorch3DCameras, from_pytorch3d

_FORMATS: tuple[Literal["ndc_isotropic", "ndc_norm_image_bounds"], ...] = ("ndc_isotropic", "ndc_norm_image_bounds")
_ROTATION_TOLERANCE = 1e-2  # of RᵀR and det R, as DiffusionSfM's loader judges sequences
_SetList = dict[str, list[tuple[str, int, str]]]


@dataclass(frozen=True)
class Sequence:
    """One sequence of a category.

    Attributes:
        annotation: of the sequence.
        frames: usable ones, by frame_number; camera, depth and mask are there.
        world_to_camera: float64 [N, 3, 4], OpenCV axes.
        intrinsics: float64 [N, 3, 3], pixels of the image at its own size, corner at 0.
        problems: frames that were left out.
        redacted: frames without camera, depth or mask.
        bad_cameras: problems that lie in the camera; DiffusionSfM drops a sequence that has any.
    """

    annotation: SequenceAnnotation
    frames: list[FrameAnnotation]
    world_to_camera: np.ndarray
    intrinsics: np.ndarray
    problems: list[FrameProblem] = field(default_factory=list)
    redacted: int = 0
    bad_cameras: int = 0

    @property
    def name(self) -> str:
        return self.annotation.sequence_name


@dataclass(frozen=True)
class Category:
    """A category's sequences by name, its set lists by "<subset>/<part>" with (sequence, frame_number) in order, and
    the frames that no sequence owns."""

    name: str
    sequences: dict[str, Sequence]
    subsets: dict[str, list[tuple[str, int]]]
    orphans: list[FrameProblem]


def list_categories(root: Path) -> list[str]:
    """Categories of a tree: the folders with annotations, sorted.

    Raises:
        PrepareError: none there.
    """
    if not root.is_dir():
        raise PrepareError(f"--src: no folder {root}; expected a CO3D v2 tree, <category>/frame_annotations.jgz")
    found = sorted(path.parent.name for path in root.glob("*/frame_annotations.jgz"))
    if not found:
        held = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise PrepareError(f"--src: {root} holds no <category>/frame_annotations.jgz (it holds {held})")
    return found


def read_category(root: Path, name: str) -> Category:
    """Read and check the annotations of one category; no image is opened.

    Raises:
        PrepareError: annotation files missing or damaged.
    """
    folder = root / name
    annotations = {entry.sequence_name: entry for entry in read_sequences(folder / "sequence_annotations.jgz")}
    frames: dict[str, list[FrameAnnotation]] = {sequence: [] for sequence in annotations}
    orphans = []
    for frame in read_frames(folder / "frame_annotations.jgz"):
        if frame.sequence_name in frames:
            frames[frame.sequence_name].append(frame)
        else:
            reason = f"{folder / 'sequence_annotations.jgz'} does not know this sequence"
            orphans.append(FrameProblem(frame.sequence_name, frame.frame_number, reason))
    sequences = {sequence: _read_sequence(annotations[sequence], frames[sequence]) for sequence in sorted(annotations)}
    return Category(name, sequences, read_subsets(folder), orphans)


def read_subsets(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """All set lists of a category folder: "fewview_dev/train" → (sequence, frame_number) in order; empty ones left out.

    In `fewview_train` the part "test" repeats "train", so it is not held out.
    """
    subsets = {}
    for path in sorted((folder / "set_lists").glob("set_lists_*.json")):
        subset = path.stem.removeprefix("set_lists_")
        for part, entries in sorted(read_json(path, _SetList).items()):
            if entries:
                subsets[f"{subset}/{part}"] = [(sequence, number) for sequence, number, _ in entries]
    return subsets


def cameras_of(viewpoints: list[Viewpoint], sizes: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """`world_to_camera` [N, 3, 4] and `intrinsics` [N, 3, 3], float64, of images of (H, W); both NDC formats."""
    world_to_camera, intrinsics = np.zeros((len(viewpoints), 3, 4)), np.zeros((len(viewpoints), 3, 3))
    for kind in _FORMATS:
        rows = [row for row, viewpoint in enumerate(viewpoints) if viewpoint.intrinsics_format == kind]
        if rows:
            some = [viewpoints[row] for row in rows]
            cameras = PyTorch3DCameras(
                torch.tensor([v.R for v in some], dtype=torch.float64),
                torch.tensor([v.T for v in some], dtype=torch.float64),
                torch.tensor([v.focal_length for v in some], dtype=torch.float64),
                torch.tensor([v.principal_point for v in some], dtype=torch.float64),
            )
            pose, pixels = from_pytorch3d(cameras, torch.tensor([sizes[row] for row in rows]), kind)
            world_to_camera[rows], intrinsics[rows] = pose.numpy(), pixels.numpy()
    return world_to_camera, intrinsics


def camera_problem(viewpoint: Viewpoint) -> str | None:
    """Why a camera cannot be used; None where it can."""
    if viewpoint.intrinsics_format not in _FORMATS:
        return f"intrinsics_format '{viewpoint.intrinsics_format}': expected {' or '.join(_FORMATS)}"
    rotation = np.array(viewpoint.R)
    if not (np.isfinite(rotation).all() and np.isfinite(viewpoint.T).all()):
        return "camera R or T is not finite"
    if not all(np.isfinite(f) and f > 0 for f in viewpoint.focal_length):
        return f"focal_length {viewpoint.focal_length}: expected two positive numbers"
    if not np.isfinite(viewpoint.principal_point).all():
        return f"principal_point {viewpoint.principal_point} is not finite"
    determinant = np.linalg.det(rotation)
    if np.abs(rotation.T @ rotation - np.eye(3)).max() > _ROTATION_TOLERANCE or abs(determinant - 1) > (
        _ROTATION_TOLERANCE
    ):
        return f"R is no rotation (determinant {determinant:.4f})"
    return None


def _read_sequence(annotation: SequenceAnnotation, frames: list[FrameAnnotation]) -> Sequence:
    usable: list[FrameAnnotation] = []
    problems: list[FrameProblem] = []
    redacted = bad_cameras = 0
    for frame, is_repeated in _in_order(frames):
        if frame.viewpoint is None or frame.depth is None or frame.mask is None:
            redacted += 1
            continue
        reason = camera_problem(frame.viewpoint)
        bad_cameras += reason is not None
        if reason is None and is_repeated:
            reason = "this frame_number comes twice; the first entry is kept"
        if reason is None and min(frame.image.size) < 1:
            reason = f"image size {frame.image.size}"
        if reason is None:
            usable.append(frame)
        else:
            where = f"{annotation.category}/frame_annotations.jgz"
            problems.append(FrameProblem(annotation.sequence_name, frame.frame_number, f"{where}: {reason}"))
    viewpoints = [frame.viewpoint for frame in usable if frame.viewpoint is not None]
    cameras = cameras_of(viewpoints, [frame.image.size for frame in usable])
    return Sequence(annotation, usable, *cameras, problems, redacted, bad_cameras)


def _in_order(frames: list[FrameAnnotation]) -> Iterator[tuple[FrameAnnotation, bool]]:
    """By frame_number (the files list them in any order), with a mark on repetitions."""
    last = None
    for frame in sorted(frames, key=lambda frame: frame.frame_number):
        yield frame, frame.frame_number == last
        last = frame.frame_number
