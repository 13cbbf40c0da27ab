"""Scores of DiffusionSfM's test, scene by scene: kept in a file, so that a test that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restrike.data.multiview_filter import SEEN, UNSEEN
from restrike.data.samples import MultiViewBatch
from restrike.geometry import decode_rays, invert_se3, unproject_depth
from restrike.metrics.pose_table import SceneScore, format_pose_table, pose_table, score_cameras, score_points

_VIEW_FIELDS = (
    "images", "depth", "valid_depth", "foreground", "intrinsics", "world_to_camera", "crop_boxes", "source_sizes",
    "frame_numbers", "is_video",
)  # fmt: skip
_PARAMETER_BYTES = 4096


class SceneScores:
    """Scores of one set of weights under one set of settings.

    Every rank appends to its own file and reads those of all, so another number of ranks goes on as well.

    Args:
        folder: Of the run's tests; each identity has its own below it.
        identity: Everything that a score depends on beside the scene.
        rank: Of this process.
        title: Of the printed table.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], rank: int, title: str = "") -> None:
        self.title = title
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        self.folder, self.rank = folder / digest, rank
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (self.folder / "settings.json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        self._known = set(self._read())

    def has(self, key: str) -> bool:
        """Whether the scene of a batch's key has been scored."""
        return key in self._known

    def add(self, keys: Sequence[str], scores: Sequence[Sequence[SceneScore]]) -> None:
        """Keep the scores of scenes, all numbers of views at once."""
        with open(self.folder / f"scenes_{self.rank}.jsonl", "a", encoding="utf-8") as file:
            for key, rows in zip(keys, scores, strict=True):
                # The newline comes first: the line that a killed test was writing must not swallow this one.
                file.write("\n" + json.dumps({"key": key, "scores": rows}))
                self._known.add(key)

    def summarize(self, is_writer: bool) -> dict[str, float]:
        """The table's values by name ("seen/rra@15_n8"); one rank prints and writes it."""
        scores = [score for rows in self._read().values() for score in rows]
        tables = {"seen": pose_table(scores, SEEN), "unseen": pose_table(scores, UNSEEN)}
        tables = {title: table for title, table in tables.items() if table} or {"all": pose_table(scores)}
        if is_writer:
            text = format_pose_table(tables)
            (self.folder / "table.md").write_text(text + "\n", encoding="utf-8")
            (self.folder / "table.json").write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")
            print(f"\n{self.title and self.title + chr(10)}{text}\n\nscores of each scene: {self.folder}\n")
        return {
            f"{title}/{name}_n{views}": value
            for title, table in tables.items()
            for views, row in table.items()
            for name, value in row.items()
            if name != "scenes"
        }

    def _read(self) -> dict[str, list[SceneScore]]:
        found: dict[str, list[SceneScore]] = {}
        for path in sorted(self.folder.glob("scenes_*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the line that a killed test was writing
                    continue
                found[record["key"]] = [SceneScore(*row) for row in record["scores"]]
        return found


def score_scenes(
    batch: MultiViewBatch,
    rays: Tensor | None,
    world_to_camera: Tensor,
    scene_scales: Mapping[str, float],
    max_points: int | None = None,
) -> list[SceneScore]:
    """Scores of each scene of a batch, all its views counted.

    Args:
        batch: With depth at the resolution of the comparison; keys "<category>/<sequence>", or with "#<order>".
        rays: [B, V, 8, P, P], sampled; None has no points to compare.
        world_to_camera: [B, V, 3, 4], predicted.
        scene_scales: Of whole sequences, by "<category>/<sequence>"; where one is missing, that of the batch's views.
        max_points: As in `score_points`.
    """
    points = [(math.nan, math.nan)] * len(batch.keys) if rays is None else _score_points(batch, rays, max_points)
    scores = []
    for row, key in enumerate(batch.keys):
        name, _, order = key.partition("#")
        category, _, sequence = name.partition("/")
        size = scene_scales.get(name)
        whole = None if size is None else batch.world_to_camera.new_tensor(size)
        rotation, center = score_cameras(world_to_camera[row], batch.world_to_camera[row], whole)
        views = batch.images.shape[1]
        scores.append(SceneScore(category, sequence, int(order or 0), views, rotation, center, *points[row]))
    return scores


def _score_points(batch: MultiViewBatch, rays: Tensor, max_points: int | None) -> list[tuple[float, float]]:
    """Of each scene the Chamfer distance of all known depth, and of the object's."""
    depth_size = batch.depth.shape[-1]
    _, endpoints = decode_rays(F.interpolate(rays.flatten(0, 1), depth_size, mode="nearest-exact"))
    endpoints = endpoints.unflatten(0, rays.shape[:2])
    depth = torch.where(batch.valid_depth, batch.depth, 0.0)
    scale = depth_size / batch.images.shape[-1]
    intrinsics = batch.intrinsics * batch.intrinsics.new_tensor([scale, scale, 1.0])[:, None]
    true = unproject_depth(depth, intrinsics, invert_se3(batch.world_to_camera))
    known = batch.valid_depth & true.isfinite().all(-1)
    masks = (known, known & batch.foreground)
    return [
        tuple(score_points(endpoints[row], true[row], mask[row], max_points) for mask in masks)  # type: ignore[misc]
        for row in range(len(batch.keys))
    ]


def first_views(batch: MultiViewBatch, views: int) -> MultiViewBatch:
    """The first views of every scene."""
    return batch._replace(**{name: getattr(batch, name)[:, :views] for name in _VIEW_FIELDS})


def fingerprint(net: nn.Module) -> str:
    """Of weights: from the beginning of each parameter, so that it costs nothing."""
    check = 0
    for name, parameter in net.named_parameters():
        head = parameter.detach().flatten()[: _PARAMETER_BYTES // 4].float().cpu().numpy().tobytes()
        check = zlib.crc32(head, zlib.crc32(name.encode(), check))
    return f"{check:08x}"
