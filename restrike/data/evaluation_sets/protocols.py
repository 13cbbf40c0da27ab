"""Which frames of which set a published number is about, and how it is scored (docs/protocols.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from restrike.data.evaluation_sets import indoor_scans, kitti, nyu, re10k, rgbd_lists, sintel
from restrike.data.evaluation_sets.sequences import ViewSequence
from restrike.data.files import sha256_lines

ViewProtocolName = Literal[
    "sintel-pose", "tum-pose", "scannet-pose", "sintel-depth", "bonn-depth", "kitti-depth", "sintel-mono", "bonn-mono",
    "kitti-mono", "nyu-mono", "seven-scenes", "nrgbd", "re10k",
]  # fmt: skip
Scoring = Literal["trajectory", "video_depth", "frame_depth", "reconstruction", "relative_pose"]
_MIN_VIEWS = {"trajectory": 3, "relative_pose": 2}


@dataclass(frozen=True)
class ViewProtocol:
    """How a set is evaluated.

    Attributes:
        title: set, what is measured, and the paper whose protocol it is.
        scoring: "trajectory": ATE and RPE of each sequence. "video_depth": one alignment a sequence. "frame_depth":
            each frame by itself, after the ratio of medians. "reconstruction": points of all views of a sequence.
            "relative_pose": all pairs of views of a sequence.
        open: reads the set's layout.
        num_sequences: of the whole set; None where the paper does not say.
        num_frames: the same of each sequence.
        max_depth: true depth at or above it is not evaluated.
        clip: aligned predictions above it are lowered to it.
    """

    title: str
    scoring: Scoring
    open: Callable[[Path], list[ViewSequence]]
    num_sequences: int | None = None
    num_frames: int | None = None
    max_depth: float | None = None
    clip: float | None = None

    @property
    def is_depth(self) -> bool:
        """Whether maps of whole pictures are compared, at the truth's resolution."""
        return self.scoring in ("video_depth", "frame_depth")


_CUT3R = "CUT3R, arXiv 2501.12387"
_SINTEL_DEPTH = partial(sintel.open_sintel, has_depth=True, has_poses=False)
_SINTEL = len(sintel.SEQUENCES)
_BONN = len(rgbd_lists.BONN_SEQUENCES)
PROTOCOLS: dict[str, ViewProtocol] = {
    "sintel-pose": ViewProtocol(
        f"Sintel final, camera trajectories ({_CUT3R})", "trajectory",
        partial(sintel.open_sintel, has_depth=False, has_poses=True), _SINTEL,
    ),
    "tum-pose": ViewProtocol(
        f"TUM-dynamics, camera trajectories, 90 frames 3 apart ({_CUT3R})", "trajectory", rgbd_lists.open_tum_dynamics,
        len(rgbd_lists.TUM_SEQUENCES), rgbd_lists.TUM_FRAMES,
    ),
    "scannet-pose": ViewProtocol(
        f"ScanNet test scenes, camera trajectories, 90 frames 3 apart ({_CUT3R})", "trajectory",
        indoor_scans.open_scannet, indoor_scans.SCANNET_SCENES,
    ),
    "sintel-depth": ViewProtocol(
        f"Sintel final, video depth below 70, predictions clipped at 70 ({_CUT3R})", "video_depth", _SINTEL_DEPTH,
        _SINTEL, max_depth=70, clip=70,
    ),
    "bonn-depth": ViewProtocol(
        f"Bonn, video depth below 70 m, 110 frames ({_CUT3R})", "video_depth", rgbd_lists.open_bonn, _BONN,
        rgbd_lists.BONN_FRAMES, max_depth=70,
    ),
    "kitti-depth": ViewProtocol(
        f"KITTI validation drives, video depth, 110 frames at most ({_CUT3R})", "video_depth", kitti.open_kitti_videos,
        kitti.VIDEO_DRIVES,
    ),
    "sintel-mono": ViewProtocol(
        f"Sintel final, depth of single frames below 70, predictions clipped at 70 ({_CUT3R})", "frame_depth",
        _SINTEL_DEPTH, _SINTEL, max_depth=70, clip=70,
    ),
    "bonn-mono": ViewProtocol(
        f"Bonn, depth of single frames below 70 m ({_CUT3R})", "frame_depth", rgbd_lists.open_bonn, _BONN,
        rgbd_lists.BONN_FRAMES, max_depth=70,
    ),
    "kitti-mono": ViewProtocol(
        f"KITTI val_selection_cropped, depth of single frames ({_CUT3R})", "frame_depth", kitti.open_kitti_selection,
        1, kitti.SELECTION_IMAGES,
    ),
    "nyu-mono": ViewProtocol(
        f"NYU-v2 test, depth of single frames ({_CUT3R})", "frame_depth", nyu.open_nyu, 1, nyu.IMAGES
    ),
    "seven-scenes": ViewProtocol(
        f"7-Scenes test sequences, reconstruction from every 200th frame ({_CUT3R})", "reconstruction",
        indoor_scans.open_seven_scenes, indoor_scans.SEVEN_SCENES_SEQUENCES,
    ),
    "nrgbd": ViewProtocol(
        f"NRGBD, reconstruction from every 500th frame ({_CUT3R})", "reconstruction", indoor_scans.open_nrgbd
    ),
    "re10k": ViewProtocol(
        f"RealEstate10K test clips, relative poses of {re10k.FRAMES} random frames, seed {re10k.SEED} "
        "(VGGT, arXiv 2503.11651)", "relative_pose", re10k.open_re10k, None, re10k.FRAMES,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ViewSet:
    """The frames of one protocol below one folder.

    Attributes:
        sequences: as a network sees them; single frames where each is scored by itself.
        is_whole: whether it has the published number of sequences and frames; None where no number was published.
        sha256: of the list "<sequence> <image> <depth>", a frame a line, in order: two numbers with equal hashes are
            about the same files.
    """

    protocol: ViewProtocol
    sequences: list[ViewSequence]
    is_whole: bool | None
    sha256: str

    @property
    def num_frames(self) -> int:
        """Of all sequences."""
        return sum(len(sequence.frames) for sequence in self.sequences)

    @property
    def description(self) -> str:
        """Protocol, what it is about and the hash of that, for beside a number."""
        mark = "INCOMPLETE: " if self.is_whole is False else ""
        count = f"{len(self.sequences):,} sequences, " if self.protocol.scoring != "frame_depth" else ""
        return f"{self.protocol.title}; {mark}{count}{self.num_frames:,} frames; frame list sha256 {self.sha256[:16]}"


def open_view_set(name: ViewProtocolName, root: Path) -> ViewSet:
    """List the frames of a protocol, and check that each has the truth that it takes.

    Args:
        name: Of `PROTOCOLS`.
        root: Folder in the set's genuine layout.

    Raises:
        ValueError: another layout, or a frame without its truth; names the file and what was expected.
    """
    protocol = PROTOCOLS[name]
    sequences = protocol.open(root)
    for sequence in sequences:
        _check_truth(protocol, sequence, root)
    lines = [f"{s.name} {frame.image} {frame.depth or '-'}" for s in sequences for frame in s.frames]
    is_whole = _is_whole(protocol, sequences)
    if protocol.scoring == "frame_depth":
        sequences = [ViewSequence(frame.image, [frame], s.read_depth) for s in sequences for frame in s.frames]
    return ViewSet(protocol, sequences, is_whole, sha256_lines(lines))


def _check_truth(protocol: ViewProtocol, sequence: ViewSequence, root: Path) -> None:
    needs_camera = protocol.scoring in ("reconstruction", "relative_pose")
    for frame in sequence.frames:
        if needs_camera and frame.camera_to_world is None:
            raise ValueError(
                f"data.root: {root / frame.image} has no usable pose, which this protocol cannot do without"
            )
        assert frame.depth is not None or protocol.scoring in _MIN_VIEWS, f"the reader gives {frame.image} no depth"
    known = sum(frame.camera_to_world is not None for frame in sequence.frames)
    least = _MIN_VIEWS.get(protocol.scoring, 0)
    if known < least:
        raise ValueError(
            f"data.root: {root}: {sequence.name} has {known} frames with a pose, and {protocol.scoring} needs {least}"
        )


def _is_whole(protocol: ViewProtocol, sequences: list[ViewSequence]) -> bool | None:
    if protocol.num_sequences is None:
        return None
    has_frames = all(protocol.num_frames in (None, len(sequence.frames)) for sequence in sequences)
    return has_frames and len(sequences) == protocol.num_sequences
