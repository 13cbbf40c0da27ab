"""An evaluation set of several views by its own protocol: what is scored, and which frames a number is about."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.protocols import HasViewSet, PredictsViews, require
from restrike.data.evaluation_sets import ViewFrame, ViewProtocol, ViewSequence
from restrike.data.predicted_views import crop_pixel_intrinsics
from restrike.geometry import compose_se3, invert_se3, unproject_depth
from restrike.metrics.depth import DepthAlignment
from restrike.metrics.view_scores import (
    VIDEO_ALIGNMENTS,
    FrameDepthScore,
    ReconstructionScore,
    RelativePoseScore,
    SequenceScore,
    TrajectoryScore,
    VideoDepthScore,
    ViewAnswer,
    ViewTruth,
)

_STAGES = {"validate": "val", "test": "test"}
_NEEDS = {"camera_to_world": "cameras", "depth": "depth", "points_first": "points, or depth and cameras"}


class ViewBenchmark(Callback):
    """Scores what `predict_step` says of the datamodule's `view_set` by its protocol, and prints both.

    The numbers, the protocol's name, the number of frames and the hash of their list go to `<run>/benchmark.json`. The
    points of a reconstruction are the network's own in the first camera where it has such, else depth lifted by its
    cameras.

    Args:
        alignments: Of video depth: "metric", "scale", "scale_shift". The last takes 1000 steps over all pixels of a
            sequence, which is minutes each without a GPU.
        max_points: Points of a reconstruction that are compared; null takes all, as published.
    """

    def __init__(self, alignments: list[DepthAlignment] | None = None, max_points: int | None = None) -> None:
        self.alignments = tuple(VIDEO_ALIGNMENTS if alignments is None else alignments)
        self.max_points = max_points
        self._score: SequenceScore | None = None
        self._coming: Iterator[ViewSequence] = iter(())
        self._sequence: ViewSequence | None = None
        self._first_camera: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module predict in its evaluation steps.

        Raises:
            ValueError: another datamodule or module than it needs, or another stage than evaluation.
        """
        require(trainer.datamodule, HasViewSet, "view_benchmark")
        require(pl_module, PredictsViews, "view_benchmark")
        if stage not in _STAGES:
            raise ValueError("callbacks.view_benchmark is for test and validate only")
        pl_module.predicts_only = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the evaluation steps back."""
        pl_module.predicts_only = False

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing."""
        data = trainer.datamodule
        self._score = view_score(data.view_set.protocol, self.alignments, self.max_points).to(pl_module.device)
        self._coming, self._sequence = iter(data.own_sequences), None

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A sequence begins where its first frame does."""
        if int(batch.frame_numbers[0, 0]) == 0:
            self._sequence, self._first_camera = next(self._coming), None
            pl_module.on_predict_start()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score each view, and the sequence at its last one.

        Raises:
            ValueError: the network does not say what the protocol scores, or the truth cannot be read.
        """
        assert self._score is not None and self._sequence is not None
        sequence, data = self._sequence, trainer.datamodule
        for row, number in enumerate(batch.frame_numbers[0].tolist()):
            said = self._answer(outputs, batch, row)
            if missing := [_NEEDS[name] for name in self._score.needs if getattr(said, name) is None]:
                raise ValueError(
                    f"data.protocol: {data.protocol} scores {missing[0]}, and this network says none: take another "
                    "model, or one with that head (model.model_args)"
                )
            self._score.add(said, read_truth(sequence.frames[number], sequence, data.root, batch.source_sizes[0, row]))
        if int(batch.frame_numbers[0, -1]) + 1 == len(sequence.frames):
            self._score.finish()

    # A validation is scored as a test.
    on_validation_epoch_start = on_test_epoch_start
    on_validation_batch_start = on_test_batch_start
    on_validation_batch_end = on_test_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum over ranks, and log."""
        self._log(trainer, pl_module)

    on_validation_epoch_end = on_test_epoch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write."""
        self._report(trainer, pl_module, sum(trainer.num_test_batches))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in a test."""
        self._report(trainer, pl_module, sum(trainer.num_val_batches))

    def _answer(self, outputs: Any, batch: Any, row: int) -> ViewAnswer:
        """What the network says of the view in that row of its batch."""
        views = outputs.get("views")
        camera = invert_se3(outputs["world_to_camera"][0, row])
        if self._first_camera is None:
            self._first_camera = camera
        depth = None if views is None else views.depth[0, row]
        box = batch.crop_boxes[0, row]
        points = outputs.get("points_world")
        if points is not None:
            points = points[0, row]
        elif views is not None:
            to_first = compose_se3(invert_se3(self._first_camera), camera)
            intrinsics = crop_pixel_intrinsics(views.intrinsics[0, row], box, (depth.shape[0], depth.shape[1]))
            points = unproject_depth(depth, intrinsics, to_first)
        return ViewAnswer(camera, depth, points, box)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._score is not None
        name = _STAGES[str(trainer.state.fn.value)]
        values = {f"{name}/{key}": value.float() for key, value in self._score.compute().items()}
        pl_module.log_dict(values, rank_zero_only=False, sync_dist=False)

    def _report(self, trainer: Trainer, pl_module: LightningModule, batches: int | float) -> None:
        if not trainer.is_global_zero:
            return
        weights = trainer.ckpt_path or pl_module.hparams.get("pretrained")
        data = trainer.datamodule
        chosen = data.view_set
        is_cut = batches < len(data.test_dataloader())
        metrics = {
            key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(("test/", "val/"))
        }
        record = {
            "protocol": data.protocol,
            "title": chosen.protocol.title,
            "sequences": len(chosen.sequences),
            "frames": chosen.num_frames,
            "is_whole": False if is_cut else chosen.is_whole,
            "frame_list_sha256": chosen.sha256,
            "weights": Path(str(weights)).name if weights else None,
            **metrics,
        }
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        (root / "benchmark.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        note = f"\nINCOMPLETE: the first {batches} of {len(data.test_dataloader())} batches" if is_cut else ""
        lines = [f"{key.partition('/')[2]:<24} {value:.4f}" for key, value in metrics.items()]
        note += "" if weights else "\nrandom weights: give --model.pretrained FILE or --ckpt_path FILE"
        print("\n".join([f"\n{chosen.description}{note}", *lines]))


def view_score(protocol: ViewProtocol, alignments: tuple[DepthAlignment, ...], max_points: int | None) -> SequenceScore:
    """How a protocol scores."""
    if protocol.scoring == "trajectory":
        return TrajectoryScore()
    if protocol.scoring == "relative_pose":
        return RelativePoseScore()
    if protocol.scoring == "reconstruction":
        return ReconstructionScore(max_points)
    if protocol.scoring == "frame_depth":
        return FrameDepthScore(protocol.max_depth, protocol.clip)
    return VideoDepthScore(alignments, protocol.max_depth, protocol.clip)


def read_truth(frame: ViewFrame, sequence: ViewSequence, root: Path, size: Tensor) -> ViewTruth:
    """The truth of a frame whose picture has `size` (H, W)."""
    depth = None
    if frame.depth is not None and sequence.read_depth is not None:
        depth = torch.from_numpy(sequence.read_depth(root / frame.depth))
    pose, intrinsics = (None if x is None else torch.from_numpy(x) for x in (frame.camera_to_world, frame.intrinsics))
    height, width = size.tolist()
    return ViewTruth((height, width), pose, depth, intrinsics)
