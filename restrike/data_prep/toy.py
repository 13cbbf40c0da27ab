"""A small but genuine CO3D v2 tree of ray-cast scenes: the embedded data set of every multi-view recipe.

Real format down to the half-float depth, and with the traps of the real one: file numbers that are not frame numbers,
off-centre principal points, an infinite depth pixel, holes, low viewpoint scores, an arbitrary scale and pose of each
world, `fewview_train` whose "test" repeats "train". The geometry is exact, so it tests every convention downstream.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import msgspec
import numpy as np
import torch

from restrike.data.decode import decode_rgb
from restrike.data.depth_png import encode_depth, encode_png
from restrike.data.files import write_atomically
from restrike.data.randomness import Purpose, stream
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.jobs import run_jobs
from restrike.data_prep.progress import Progress
from restrike.data_prep.toy_scene import KINDS, Picture, Scene, View, pyramid, render, stack_of_solids
from restrike.geometry import to_pytorch3d

DEFAULT_CATEGORIES = ("apple", "bottle", "cup", "teddybear", "ball")  # four seen ones and an unseen one
TEST_SHARE = 0.25
_PHOTOS = ("astronaut", "brick", "chelsea", "china", "coffee", "flower", "grass", "gravel", "hubble", "text")
_WALLPAPERS = ("astronaut", "chelsea", "china", "coffee", "flower", "hubble")  # no two parts of these look alike
_ASPECTS = ((4, 3), (3, 4), (1, 1))  # height : width
_GRAZING = 0.2  # cosine below which depth has a hole, as in multi-view stereo
_JPEG_QUALITY = 92
_ROOM = 4.0
_WORK = ".prepare"
_ROOM_NUMBER = 2**31  # of the stream that draws a category's room: no sequence's
_VERSION = 1  # part of every record: a change of the pictures makes old trees again

Rooms = Literal["own", "category"]


@dataclass(frozen=True)
class ToyOptions:
    """What to draw.

    Attributes:
        categories: CO3D's names; content differs by its first solid only.
        sequences: per category; the last quarter (at least one of two or more) is held out as "test".
        frames: per sequence.
        size: short side, pixels.
        fps: frames a second of the pretended video (time stamps only).
        seed: of everything.
        rooms: "own": every sequence has a room of its own, so only matching tells how a camera moved. "category": all
            sequences of a category stand in one room, papered with one photo a side and lit alike, and walks pass along
            the same half of it; object, walk and lens are each sequence's own. So a network can learn in minutes to see
            where in the room a picture was taken.
        workers: processes.
    """

    categories: tuple[str, ...] = DEFAULT_CATEGORIES
    sequences: int = 12
    frames: int = 30
    size: int = 192
    fps: float = 10.0
    seed: int = 0
    rooms: Rooms = "own"
    workers: int = 1


class _Job(NamedTuple):
    out: Path
    category: int
    sequence: int
    options: ToyOptions

    @property
    def category_name(self) -> str:
        return self.options.categories[self.category]

    @property
    def name(self) -> str:
        number = 100 * self.category + self.sequence
        return f"{110 + self.category}_{10000 + number}_{20000 + number}"


class _Record(msgspec.Struct):
    """A finished sequence: annotations of its frames and its own, and what they were made from."""

    fingerprint: str
    frames: list[dict[str, Any]]
    sequence: dict[str, Any]


def prepare_toy(out: Path, options: ToyOptions, progress: Progress | None = None) -> int:
    """Write the tree; run again after any end, it keeps finished sequences. Returns the number of frames.

    Raises:
        PrepareError: impossible options, or a folder that cannot be written.
    """
    _check(out, options)
    jobs = [_Job(out, c, s, options) for c in range(len(options.categories)) for s in range(options.sequences)]
    progress = progress or Progress(len(jobs) * options.frames, "frames")
    records: dict[_Job, _Record] = {}
    try:
        for job, (record, kept) in run_jobs(_write_sequence, jobs, options.workers):
            records[job] = record
            progress.add(options.frames, kept=kept)
        for category in range(len(options.categories)):
            _write_category(out, [(job, records[job]) for job in jobs if job.category == category])
        subsets = ["fewview_dev", "fewview_train", "manyview_dev_0"]
        _write_json(out / "category_to_subset_name_list.json", dict.fromkeys(sorted(options.categories), subsets))
    except OSError as error:
        raise PrepareError(f"--out: cannot write {out}: {error.strerror or error}") from error
    return len(jobs) * options.frames


def is_test_sequence(number: int, count: int) -> bool:
    """Whether the sequence of that number is held out."""
    held_out = max(1, int(count * TEST_SHARE)) if count > 1 else 0
    return number >= count - held_out


def _check(out: Path, options: ToyOptions) -> None:
    if out.exists() and not out.is_dir():
        raise PrepareError(f"--out: {out} is a file; name a folder")
    if len(set(options.categories)) < len(options.categories) or not options.categories:
        raise PrepareError(f"--categories: expected different names, got {', '.join(options.categories) or 'none'}")
    if bad := [name for name in options.categories if not name.isalpha()]:
        raise PrepareError(f"--categories: letters only, got '{bad[0]}'")
    others = {path.parent.name for path in out.glob("*/frame_annotations.jgz")} - set(options.categories)
    if others:
        raise PrepareError(f"--out: {out} holds another tree (category '{sorted(others)[0]}'); choose an empty folder")


def _write_sequence(job: _Job) -> tuple[_Record, bool]:
    """Draw one sequence, or keep it; True = kept."""
    cv2.setNumThreads(1)  # processes are the parallelism
    path = job.out / _WORK / f"{job.category_name}-{job.name}.json"
    options = job.options
    made_of = (_VERSION, options.frames, options.size, options.fps, options.seed, job.name)
    fingerprint = repr(made_of if options.rooms == "own" else (*made_of, options.rooms))
    try:
        record = msgspec.json.decode(path.read_bytes(), type=_Record)
        if record.fingerprint == fingerprint:
            return record, True
    except (FileNotFoundError, msgspec.DecodeError):
        pass
    record = _draw_sequence(job, fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.encode(record))
    return record, False


def _draw_sequence(job: _Job, fingerprint: str) -> _Record:
    options = job.options
    random = stream(options.seed, Purpose.PACKING, job.category, job.sequence)
    scene = _scene(job, random)
    views = _orbit(job, scene, random)
    scale, turn, shift = random.uniform(2, 9), _random_rotation(random), random.normal(0, 3, 3)
    stride, offset = int(random.integers(1, 5)), int(random.integers(1, 6))
    frames, points, colors = [], [], []
    for number, view in enumerate(views):
        picture = render(scene, view, _textures())
        moved = _move_world(view.world_to_camera, scale, turn, shift)
        name = f"frame{stride * number + offset:06d}"
        frames.append(_write_frame(job, number, name, picture, view, moved, scale))
        if number % max(1, options.frames // 6) == 0:
            cloud, color = _object_points(picture, view, moved, scale)
            points.append(cloud)
            colors.append(color)
    cloud_path = f"{job.category_name}/{job.name}/pointcloud.ply"
    cloud, color = np.concatenate(points), np.concatenate(colors)
    _write_ply(job.out / cloud_path, cloud, color)
    low = job.sequence % 6 == 4 and not is_test_sequence(job.sequence, options.sequences)
    sequence = {
        "sequence_name": job.name,
        "category": job.category_name,
        "video": None,
        "point_cloud": {"path": cloud_path, "quality_score": 1.5, "n_points": len(cloud)},
        "viewpoint_quality_score": round(random.uniform(0.1, 0.45) if low else random.uniform(0.6, 2.0), 4),
    }
    return _Record(fingerprint, frames, sequence)


def _scene(job: _Job, random: np.random.Generator) -> Scene:
    solids = stack_of_solids(random, KINDS[job.category % len(KINDS)], len(_PHOTOS))
    is_shared = job.options.rooms == "category"
    if is_shared:
        random = stream(job.options.seed, Purpose.PACKING, job.category, _ROOM_NUMBER)
        walls = tuple(_PHOTOS.index(name) for name in random.permutation(_WALLPAPERS))
    else:
        walls = tuple(random.integers(len(_PHOTOS), size=6).tolist())
    light = np.array([random.uniform(-1, 1), random.uniform(-1, 1), random.uniform(0.7, 1.5)])
    return Scene(solids, _ROOM, walls, light / np.linalg.norm(light), is_papered=is_shared)


def _orbit(job: _Job, scene: Scene, random: np.random.Generator) -> list[View]:
    """A walk around the object, which fills most of the short side."""
    count, size = job.options.frames, job.options.size
    ratio = _ASPECTS[int(random.integers(len(_ASPECTS)))]
    height, width = (round(size * side / min(ratio)) for side in ratio)
    if job.options.rooms == "category":
        sweep, start = random.uniform(0.6, 1.0) * math.pi, random.uniform(-0.3, 0.3)
    else:
        sweep, start = random.uniform(1.2, 2.0) * math.pi, random.uniform(0, 2 * math.pi)
    wobble, roll = random.uniform(0.05, 0.15), random.normal(0, 0.06)
    focal = random.uniform(1.9, 2.8) * size / 2
    top = max(solid.height + float(solid.half[2]) for solid in scene.solids)
    extent = max(top, 2 * max(float(solid.half[:2].max()) for solid in scene.solids))
    distance = min(0.8 * _ROOM, 1.4 * extent * focal / size)
    off = random.uniform(-0.03, 0.03, 2) * size if job.sequence else np.zeros(2)
    center = (width / 2 + float(off[0]), height / 2 + float(off[1]))
    views = []
    for step in np.linspace(0, 1, count):
        angle = start + sweep * step
        elevation = 0.55 + wobble * math.sin(5 * step + start)
        around = np.array([math.cos(angle) * math.cos(elevation), math.sin(angle) * math.cos(elevation)])
        eye = distance * np.append(around, math.sin(elevation))
        target = np.array([0, 0, 0.5 * top]) + random.normal(0, 0.03, 3)
        views.append(View(_look_at(eye, target, roll + random.normal(0, 0.02)), focal, center, (height, width)))
    return views


def _look_at(eye: np.ndarray, target: np.ndarray, roll: float) -> np.ndarray:
    """OpenCV `world_to_camera` [3, 4]; the world's z is up."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    cos, sin = math.cos(roll), math.sin(roll)
    rotation = np.stack([cos * right + sin * down, cos * down - sin * right, forward])
    return np.concatenate([rotation, -(rotation @ eye)[:, None]], axis=1)


def _random_rotation(random: np.random.Generator) -> np.ndarray:
    rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
    return rotation * np.sign(np.linalg.det(rotation))


def _move_world(world_to_camera: np.ndarray, scale: float, turn: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The camera after X' = scale (turn X) + shift, in a unit in which its rotation stays one."""
    rotation = world_to_camera[:, :3] @ turn.T
    return np.concatenate([rotation, (scale * world_to_camera[:, 3] - rotation @ shift)[:, None]], axis=1)


def _write_frame(
    job: _Job, number: int, name: str, picture: Picture, view: View, world_to_camera: np.ndarray, scale: float
) -> dict[str, Any]:
    """The four files of a frame; returns its annotation."""
    folder = f"{job.category_name}/{job.name}"
    paths = {
        "image": f"{folder}/images/{name}.jpg",
        "depth": f"{folder}/depths/{name}.jpg.geometric.png",
        "depth_mask": f"{folder}/depth_masks/{name}.png",
        "mask": f"{folder}/masks/{name}.png",
    }
    depth = np.where(picture.incidence > _GRAZING, scale * picture.depth, 0)
    reliable = cv2.erode((depth > 0).astype(np.uint8), np.ones((3, 3), np.uint8))
    if number == 1:
        depth[0, 0], reliable[0, 0] = np.inf, 0  # genuine files hold infinities
    foreground = cv2.GaussianBlur(255 * picture.is_object.astype(np.uint8), (3, 3), 0)
    _, jpeg = cv2.imencode(".jpg", picture.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    one_bit = [cv2.IMWRITE_PNG_BILEVEL, 1]
    _, reliable_png = cv2.imencode(".png", 255 * reliable, one_bit)
    files = [jpeg.tobytes(), encode_depth(depth), reliable_png.tobytes(), encode_png(foreground)]
    for path, data in zip(paths.values(), files, strict=True):
        (job.out / path).parent.mkdir(parents=True, exist_ok=True)
        (job.out / path).write_bytes(data)
    return {
        "sequence_name": job.name,
        "frame_number": number,
        "frame_timestamp": round(number / job.options.fps, 6),
        "image": {"path": paths["image"], "size": list(view.size)},
        "depth": {"path": paths["depth"], "scale_adjustment": 1.0, "mask_path": paths["depth_mask"]},
        "mask": {"path": paths["mask"], "mass": float(foreground.sum() / 255)},
        "viewpoint": _viewpoint(view, world_to_camera),
        "meta": {"synthetic": True},
    }


def _viewpoint(view: View, world_to_camera: np.ndarray) -> dict[str, Any]:
    (cx, cy), size = view.principal_point, torch.tensor(view.size)
    intrinsics = torch.tensor([[view.focal, 0, cx], [0, view.focal, cy], [0, 0, 1]], dtype=torch.float64)
    camera = to_pytorch3d(torch.from_numpy(world_to_camera), intrinsics, size)
    return {**{key: value.tolist() for key, value in camera._asdict().items()}, "intrinsics_format": "ndc_isotropic"}


def _object_points(
    picture: Picture, view: View, world_to_camera: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """A few hundred points of the object: float32 [N, 3] in world axes, uint8 [N, 3]."""
    rows, columns = np.nonzero(picture.is_object & (picture.incidence > _GRAZING))
    keep = slice(None, None, max(1, len(rows) // 400))
    rows, columns = rows[keep], columns[keep]
    z = scale * picture.depth[rows, columns].astype(np.float64)
    x, y = columns + 0.5 - view.principal_point[0], rows + 0.5 - view.principal_point[1]
    points = np.stack([x / view.focal * z, y / view.focal * z, z], axis=-1) - world_to_camera[:, 3]
    return (points @ world_to_camera[:, :3]).astype(np.float32), picture.image[rows, columns]


def _write_ply(path: Path, points: np.ndarray, colors: np.ndarray) -> None:
    names = [("x", "float"), ("y", "float"), ("z", "float"), ("red", "uchar"), ("green", "uchar"), ("blue", "uchar")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    header += [f"property {kind} {name}" for name, kind in names] + ["end_header", ""]
    vertices = np.zeros(len(points), dtype=[(name, "<f4" if kind == "float" else "u1") for name, kind in names])
    for axis in range(3):
        vertices[names[axis][0]], vertices[names[axis + 3][0]] = points[:, axis], colors[:, axis]
    path.write_bytes("\n".join(header).encode() + vertices.tobytes())


def _write_category(out: Path, done: Seq[tuple[_Job, _Record]]) -> None:
    folder, count = out / done[0][0].category_name, len(done)
    train = [job.name for job, _ in done if not is_test_sequence(job.sequence, count)]
    entries: dict[str, list[list[Any]]] = {
        job.name: [[job.name, frame["frame_number"], frame["image"]["path"]] for frame in record.frames]
        for job, record in done
    }
    known = [entry for name in train for entry in entries[name]]
    held_out = [entry for name in entries if name not in train for entry in entries[name]]
    first = entries[done[0][0].name]
    _write_jgz(folder / "frame_annotations.jgz", [frame for _, record in done for frame in record.frames])
    _write_jgz(folder / "sequence_annotations.jgz", [record.sequence for _, record in done])
    lists = {
        "fewview_train": {"train": known, "val": [], "test": known},  # repeats "train", as the genuine lists do
        "fewview_dev": {"train": known, "val": [], "test": held_out},
        "manyview_dev_0": {"train": first[::2], "val": [], "test": first[1::2]},
    }
    for name, parts in lists.items():
        _write_json(folder / "set_lists" / f"set_lists_{name}.json", parts)
        batches = [[entry] for entry in parts["test"]] if "manyview" in name else _batches(parts["test"])
        _write_json(folder / "eval_batches" / f"eval_batches_{name}.json", batches)


def _batches(entries: list[list[Any]]) -> list[list[list[Any]]]:
    """A target frame and up to three sources of the same sequence."""
    names = list(dict.fromkeys(entry[0] for entry in entries))
    return [[entry for entry in entries if entry[0] == name][:4] for name in names]


def _write_jgz(path: Path, value: Any) -> None:
    write_atomically(path, gzip.compress(msgspec.json.encode(value), mtime=0))


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.encode(value))


@lru_cache(maxsize=1)
def _textures() -> list[list[np.ndarray]]:
    folder = resources.files("restrike.data_prep") / "assets" / "photos"
    return [pyramid(decode_rgb((folder / f"{name}.jpg").read_bytes())) for name in _PHOTOS]
