"""A ray caster for scenes with exact depth, masks and cameras: photo-textured solids stacked in a photo-textured room.

Rays are ((u - cx) / f, (v - cy) / f, 1) through pixel centres, left un-normalised, so that the ray parameter *is*
z-depth. Textures are photographs with their Gaussian pyramids, since a multi-view model needs corners to match.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np

Kind = Literal["ellipsoid", "box", "cylinder"]
KINDS: tuple[Kind, ...] = ("ellipsoid", "box", "cylinder")
TEXTURE_SIDE = 512
_LEVELS = 6
_AMBIENT = 0.45
_MISS = np.float32(np.inf)
_REMAP_ROWS = 256  # cv2.remap takes fewer than 32,768 rows or columns, so point lists are folded


class Solid(NamedTuple):
    """A solid on the vertical axis: half sizes [3], centre's height, turn about the vertical (radians), texture."""

    kind: Kind
    half: np.ndarray
    height: float
    yaw: float
    texture: int


@dataclass(frozen=True)
class Scene:
    """Solids in a room [-room, room]² x [0, 2 room].

    Attributes:
        walls: textures of its six faces (x-, x+, y-, y+, floor, ceiling).
        is_papered: a face is one photo from edge to edge; otherwise photos of side 2 repeat, mirrored about the axes,
            so that half a turn round the object shows the same floor again.
    """

    solids: list[Solid]
    room: float
    walls: tuple[int, ...]
    light: np.ndarray
    is_papered: bool = False


class View(NamedTuple):
    """Camera: `world_to_camera` [3, 4] (OpenCV axes), focal length and principal point (x, y) in pixels, (H, W)."""

    world_to_camera: np.ndarray
    focal: float
    principal_point: tuple[float, float]
    size: tuple[int, int]


class Picture(NamedTuple):
    """RGB uint8 [H, W, 3]; z-depth float32 [H, W]; object bool [H, W]; cosine of the angle of incidence [H, W]."""

    image: np.ndarray
    depth: np.ndarray
    is_object: np.ndarray
    incidence: np.ndarray


class _Hits(NamedTuple):
    """Per ray: depth t (inf = none), normal [N, 3], surface coordinates [N, 2] in scene units, and texture number."""

    t: np.ndarray
    normal: np.ndarray
    uv: np.ndarray
    texture: np.ndarray


def pyramid(photo: np.ndarray) -> list[np.ndarray]:
    """A photo as a square texture with its coarser levels."""
    levels = [cv2.resize(photo, (TEXTURE_SIDE, TEXTURE_SIDE), interpolation=cv2.INTER_AREA)]
    while len(levels) < _LEVELS:
        levels.append(cv2.pyrDown(levels[-1]))
    return levels


def stack_of_solids(random: np.random.Generator, first: Kind, textures: int) -> list[Solid]:
    """One to three solids on top of each other, about a unit high in all; the first is of the category's kind."""
    count = int(random.integers(1, 4))
    solids, base, width = [], 0.0, random.uniform(0.35, 0.5)
    for number in range(count):
        kind = first if number == 0 else KINDS[int(random.integers(len(KINDS)))]
        half = np.array([width * random.uniform(0.8, 1.1), width * random.uniform(0.8, 1.1), random.uniform(0.2, 0.35)])
        if kind == "cylinder":
            half[1] = half[0]
        yaw, texture = random.uniform(0, 2 * math.pi), int(random.integers(textures))
        solids.append(Solid(kind, half, base + half[2], yaw, texture))
        base, width = base + 2 * half[2], width * random.uniform(0.6, 0.9)
    return solids


def render(scene: Scene, view: View, textures: list[list[np.ndarray]]) -> Picture:
    """Cast one ray a pixel, through its centre."""
    height, width = view.size
    origin, rays = _rays(view)
    hits = [_solid_hits(solid, origin, rays) for solid in scene.solids] + [_room_hits(scene, origin, rays)]
    nearest = np.argmin(np.stack([hit.t for hit in hits]), axis=0)
    rows = np.arange(len(rays))
    t = np.stack([hit.t for hit in hits])[nearest, rows]
    normal = np.stack([hit.normal for hit in hits])[nearest, rows]
    uv = np.stack([hit.uv for hit in hits])[nearest, rows]
    texture = np.stack([hit.texture for hit in hits])[nearest, rows]
    incidence = np.abs((normal * rays).sum(-1)) / np.linalg.norm(rays, axis=-1)
    texels_per_pixel = TEXTURE_SIDE * t / view.focal / np.clip(np.sqrt(incidence), 0.3, 1)
    color = _sample(textures, texture, uv, texels_per_pixel)
    shade = _AMBIENT + (1 - _AMBIENT) * np.clip(normal @ scene.light, 0, 1)
    image = np.clip(color * shade[:, None] + 0.5, 0, 255).astype(np.uint8)
    is_object = nearest < len(scene.solids)
    return Picture(
        image.reshape(height, width, 3),
        t.astype(np.float32).reshape(height, width),
        is_object.reshape(height, width),
        incidence.reshape(height, width),
    )


def _rays(view: View) -> tuple[np.ndarray, np.ndarray]:
    """Camera centre [3] and directions [H * W, 3], z = 1 in camera axes, both in world axes."""
    height, width = view.size
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = (u - view.principal_point[0]) / view.focal, (v - view.principal_point[1]) / view.focal
    in_camera = np.stack([x, y, np.ones_like(x)], axis=-1).reshape(-1, 3)
    rotation, translation = view.world_to_camera[:, :3], view.world_to_camera[:, 3]
    return -rotation.T @ translation, in_camera @ rotation


def _solid_hits(solid: Solid, origin: np.ndarray, rays: np.ndarray) -> _Hits:
    cos, sin = math.cos(solid.yaw), math.sin(solid.yaw)
    to_local = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    start, d = to_local @ (origin - [0, 0, solid.height]), rays @ to_local.T
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        t, normal = {"ellipsoid": _ellipsoid, "box": _box, "cylinder": _cylinder}[solid.kind](start, d, solid.half)
        hit = np.isfinite(t) & (t > 0)
        point = np.where(hit[:, None], start + d * np.where(hit, t, 0)[:, None], 0)
        uv = _surface_coordinates(solid, point, normal)
    normal = np.where(hit[:, None], normal, 0) @ to_local
    return _Hits(np.where(hit, t, _MISS), normal, uv, np.full(len(rays), solid.texture))


def _surface_coordinates(solid: Solid, point: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Lengths along the surface: of a box or a cap the plane's own, of a round side angle times radius and height."""
    around = np.arctan2(point[:, 1], point[:, 0]) * solid.half[0]
    side = np.stack([around, point[:, 2]], axis=-1)
    if solid.kind == "ellipsoid":
        return side
    axis = np.abs(np.nan_to_num(normal)).argmax(-1)
    flat = np.stack([np.where(axis == 0, point[:, 1], point[:, 0]), np.where(axis == 2, point[:, 1], point[:, 2])], -1)
    return flat if solid.kind == "box" else np.where((axis == 2)[:, None], flat, side)


def _ellipsoid(o: np.ndarray, d: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    t = _first_root(d / half, o / half)
    normal = (o + d * t[:, None]) / half**2
    return t, normal / np.linalg.norm(normal, axis=-1, keepdims=True)


def _first_root(d: np.ndarray, o: np.ndarray) -> np.ndarray:
    """Smaller t with |o + t d| = 1; NaN where there is none."""
    a, b, c = (d * d).sum(-1), d @ o, (o * o).sum(-1) - 1
    return (-b - np.sqrt(b * b - a * c)) / a


def _box(o: np.ndarray, d: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    near = (-np.sign(d) * half - o) / d
    far = (np.sign(d) * half - o) / d
    axis = near.argmax(-1)
    t = near.max(-1)
    t = np.where(t <= far.min(-1), t, np.nan)
    normal = np.eye(3)[axis] * -np.sign(np.take_along_axis(d, axis[:, None], 1))
    return t, normal


def _cylinder(o: np.ndarray, d: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    t_side = _first_root(d[:, :2] / half[0], o[:2] / half[0])
    on_side = np.abs(o[2] + d[:, 2] * t_side) <= half[2]
    t_cap = (-np.sign(d[:, 2]) * half[2] - o[2]) / d[:, 2]
    in_cap = ((o[:2] + d[:, :2] * t_cap[:, None]) ** 2).sum(-1) <= half[0] ** 2
    t_side, t_cap = np.where(on_side, t_side, np.inf), np.where(in_cap, t_cap, np.inf)
    is_side = t_side < t_cap
    t = np.minimum(t_side, t_cap)
    side = np.concatenate([(o[:2] + d[:, :2] * t[:, None]) / half[0], np.zeros((len(d), 1))], axis=-1)
    cap = np.concatenate([np.zeros((len(d), 2)), -np.sign(d[:, 2:])], axis=-1)
    return t, np.where(is_side[:, None], side, cap)


def _room_hits(scene: Scene, origin: np.ndarray, rays: np.ndarray) -> _Hits:
    """The walls from inside: where a ray leaves the box."""
    center = np.array([0, 0, scene.room])
    with np.errstate(divide="ignore", invalid="ignore"):
        far = (np.where(rays > 0, scene.room, -scene.room) - (origin - center)) / rays
    far = np.where(rays == 0, np.inf, far)
    axis, t = far.argmin(-1), far.min(-1)
    outwards = np.sign(np.take_along_axis(rays, axis[:, None], 1))
    point = origin + rays * t[:, None]
    corner, side = (np.array([scene.room, scene.room, 0]), 2 * scene.room) if scene.is_papered else (np.zeros(3), 2)
    x, y, z = ((point + corner) / side).T
    uv = np.stack([np.where(axis == 0, y, x), np.where(axis == 2, y, z)], -1)
    texture = np.array(scene.walls)[2 * axis + (outwards[:, 0] > 0)]
    return _Hits(t, -np.eye(3)[axis] * outwards, uv, texture)


def _sample(
    textures: list[list[np.ndarray]], texture: np.ndarray, uv: np.ndarray, texels_per_pixel: np.ndarray
) -> np.ndarray:
    """Bilinear colours [N, 3] at surface coordinates; one unit is one texture, mirrored where it repeats."""
    level = np.clip(np.round(np.log2(np.maximum(texels_per_pixel, 1))), 0, _LEVELS - 1).astype(int)
    color = np.zeros((len(uv), 3), dtype=np.float32)
    for number, step, rows in _groups(texture, level):
        source = textures[number][step]
        side = source.shape[0]
        folded = 1 - np.abs(1 - np.mod(uv[rows], 2))  # 0..1..0: mirrored
        at = (folded * side - 0.5).astype(np.float32)
        padded = np.concatenate([at, np.zeros((-len(at) % _REMAP_ROWS, 2), np.float32)]).reshape(-1, _REMAP_ROWS, 2)
        found = cv2.remap(source, padded, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
        color[rows] = found.reshape(-1, 3)[: len(at)]
    return color


def _groups(texture: np.ndarray, level: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Rows that share a texture and a level."""
    code = texture * _LEVELS + level
    for value in np.unique(code):
        yield int(value) // _LEVELS, int(value) % _LEVELS, np.flatnonzero(code == value)
