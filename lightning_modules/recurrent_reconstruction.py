"""CUT3R: points, poses and colours of views that come one after another (arXiv 2501.12387).

With `long_context`, a batch takes up to four optimiser steps at one learning rate: its last chunks of views have one
each, and what the views before them left in the state is their input. Lightning counts that as one step. All of it
runs inside the strategy's own forward, so DDP averages the gradients of every chunk, and precision is the trainer's.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lightning_modules.baselines import ComparesWithBaselines
from lightning_modules.multiview_reconstruction import scene_parts, select_scenes
from restrike.data.predicted_views import PredictedViews, whole_photo_intrinsics
from restrike.data.samples import MultiViewBatch
from restrike.geometry import (
    PIXEL_CENTER,
    decode_pose,
    focal_from_points,
    invert_se3,
    make_intrinsics,
    unproject_depth,
)
from restrike.losses.recurrent import RecurrentTargets, recurrent_errors, recurrent_loss, recurrent_targets
from restrike.metrics.recurrent import RecurrentMetrics, SceneGeometry
from restrike.models.cut3r import Predictions
from restrike.models.cut3r.inputs import MASK_PROBABILITIES, Inputs, draw_inputs
from restrike.models.cut3r.stream import Stream
from restrike.models.cut3r.truncation import TruncatedSequence
from restrike.models.layers.precision import no_autocast

_STAGES = ("val", "test")
_SUFFIXES = ("", "_ema", "_untrained", "_other_images", "_trivial")
_LOGGED_ERRORS = (
    "loss", "loss_pose", "loss_color",
    "distance_camera", "distance_world", "scale_invariant_camera", "scale_invariant_world",
)  # fmt: skip


class _Part(NamedTuple):
    """Scenes of a batch, from the `start`-th on."""

    batch: MultiViewBatch
    start: int


class RecurrentReconstructionModule(ComparesWithBaselines):
    """Trains and evaluates CUT3R.

    Validation and test log the published test criterion and its parts, trajectory errors and depth errors under each
    alignment; test also reconstructions, and the same numbers of two baselines: identity poses with one depth for all
    (`_trivial`), and a network with other random weights (`_untrained`).

    Args:
        model_name: "cut3r_224_linear" or "cut3r_512_dpt".
        model_args: More constructor arguments of the model.
        pretrained: A released weight file, or a checkpoint of an own run, to start from.
        pretrained_fresh: Globs over the network's names: parts that start anew, as that file has others there.
        dust3r_pretrained: A DUSt3R file to start encoder and both decoders from; the rest starts from random weights.
        dust3r_encoder_only: Take its encoder alone.
        criterion: "static", or "mixed" with measures of their own for single views and relative depth.
        alpha: Weight of - ln confidence.
        color_weight: Weight of the colours' squared error.
        is_metric: Lengths in the data are metres: the model learns them, and may be shown ray maps for images.
        mask_probabilities: Of a view's image alone, its ray map alone, and both, where `is_metric`.
        released_ray_map: Ray maps hold points, as released weights expect, instead of directions.
        released_pose_mask: A sample counts in the pose loss as its last view has an image, as released.
        long_context: Truncated back-propagation.
        chunk_views: Views of a chunk.
        trained_chunks: Chunks from the end that have a step.
        accum_steps: Parts of a batch, along scenes, that have a backward pass each.
        test_untrained: Evaluate a network of random weights, too, in a test.
        test_other_images: Evaluate the network on the images of another scene, too, in a test.
        test_lengths: Also report the first so many views of each sequence; what a model says of them does not depend
            on later ones.
        test_points: Points of a reconstruction that are compared; null takes all.
        training: Everything that all trainings share; see `TrainingModule`.
    """

    def __init__(
        self,
        model_name: str,
        model_args: dict[str, Any] | None = None,
        pretrained: str | None = None,
        pretrained_fresh: list[str] | None = None,
        dust3r_pretrained: str | None = None,
        dust3r_encoder_only: bool = False,
        criterion: Literal["static", "mixed"] = "mixed",
        alpha: float = 0.2,
        color_weight: float = 1.0,
        is_metric: bool = False,
        mask_probabilities: tuple[float, float, float] = MASK_PROBABILITIES,
        released_ray_map: bool = True,
        released_pose_mask: bool = False,
        long_context: bool = False,
        chunk_views: int = 4,
        trained_chunks: int = 4,
        accum_steps: int = 1,
        test_untrained: bool = False,
        test_other_images: bool = False,
        test_lengths: list[int] | None = None,
        test_points: int | None = 20000,
        **training: Any,
    ) -> None:
        super().__init__(model_name, model_args, pretrained=None if pretrained_fresh else pretrained, **training)
        if accum_steps < 1:
            raise ValueError(f"model.accum_steps: expected 1 or more, got {accum_steps}")
        if pretrained and dust3r_pretrained:
            raise ValueError("model.pretrained and model.dust3r_pretrained: give one file to start from")
        self._load_start(pretrained if pretrained_fresh else None, pretrained_fresh, dust3r_pretrained)
        self.metrics = nn.ModuleDict()
        for stage in _STAGES:
            lengths = [None, *(test_lengths or ())] if stage == "test" else [None]
            for name in (_metrics_name(stage, suffix, n) for suffix in _SUFFIXES for n in lengths):
                self.metrics[name] = RecurrentMetrics(_LOGGED_ERRORS, stage == "test", test_points)
        self._touched: set[tuple[str, int | None]] = set()
        self._sequences: list[TruncatedSequence] = []
        self._stream: Stream | None = None

    def setup(self, stage: str) -> None:
        """Check what only the trainer and the data know.

        Raises:
            ValueError: accumulation over batches of long sequences, or images that are not in [-1, 1].
        """
        super().setup(stage)
        if self.hparams.long_context and self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "model.long_context takes its steps within a batch: set trainer.accumulate_grad_batches to 1, and "
                "enlarge the batch with model.accum_steps"
            )
        data = getattr(self.trainer, "datamodule", None)
        for name in ("mean", "std"):
            if tuple(getattr(data, name, None) or (0.5,) * 3) != (0.5, 0.5, 0.5):
                raise ValueError(f"data.{name}: CUT3R takes images in [-1, 1], so expected [0.5, 0.5, 0.5]")

    def forward(self, images: Tensor) -> Predictions:
        """Predictions of images [B, V, 3, H, W] in [-1, 1]; see `restrike.models.cut3r.CUT3R`."""
        return self.net(images)

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> Tensor:
        """Loss of the batch, or, with `long_context`, of its next chunk."""
        if self.hparams.long_context:
            return self._chunk_step(batch, batch_idx)
        parts, shares = self._parts(batch)
        logged: list[dict[str, Tensor]] = []

        def loss_of(part: _Part) -> Tensor:
            inputs = self._inputs(part)
            losses = self._losses(self.net(part.batch.images, *inputs), self._targets(part.batch, inputs))
            logged.append({name: value.detach().mean() for name, value in losses.items()})
            return losses["loss"]

        loss = self.loss_in_parts(parts, shares, loss_of, batch_idx)
        self._log_losses(batch, logged, shares)
        return loss

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Any = None,
    ) -> None:
        """One step, and one more for every chunk of the batch that still waits."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        while self._sequences:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def validation_step(self, batch: MultiViewBatch, batch_idx: int) -> dict[str, Any] | None:
        """Metrics of the raw and the averaged weights, and of the trivial predictor."""
        if self.predicts_only:
            return self.predict_step(batch, batch_idx)
        return self._evaluate(batch, "val", [None], batch_idx)

    def test_step(self, batch: MultiViewBatch, batch_idx: int) -> dict[str, Any] | None:
        """As in validation, with reconstructions, and perhaps the untrained network and shorter sequences."""
        if self.predicts_only:
            return self.predict_step(batch, batch_idx)
        lengths = [n for n in self.hparams.test_lengths or () if n <= batch.images.shape[1]]
        return self._evaluate(batch, "test", [None, *lengths], batch_idx)

    def predict_step(self, batch: MultiViewBatch, batch_idx: int) -> dict[str, Any]:
        """Predictions of a batch of scenes, with `world_to_camera` [B, V, 3, 4] and `intrinsics` [B, V, 3, 3], and the
        same as `PredictedViews`. Where the data streams (`is_streaming`), a batch goes on where the last one ended."""
        with no_autocast(self.device):
            return self._answer(batch, self._predict(batch.images))

    def _answer(self, batch: MultiViewBatch, predictions: Predictions) -> dict[str, Any]:
        height, width = batch.images.shape[-2:]
        center = torch.tensor([width / 2, height / 2], device=self.device)
        focal = focal_from_points(predictions.points_camera, center, pixel_center=PIXEL_CENTER)
        cameras = invert_se3(decode_pose(predictions.poses))
        intrinsics = make_intrinsics(focal[..., None].expand(*focal.shape, 2), center)
        whole = whole_photo_intrinsics(intrinsics, batch.crop_boxes, (height, width))
        depth, confidence = predictions.points_camera[..., 2].float(), predictions.confidence_camera.float()
        return {
            "keys": batch.keys,
            **predictions._asdict(),
            "world_to_camera": cameras,
            "intrinsics": intrinsics,
            "views": PredictedViews(cameras, whole, depth, confidence),
        }

    def on_predict_start(self) -> None:
        """A new scene."""
        self._stream = None

    def _predict(self, images: Tensor) -> Predictions:
        net = list(self.evaluated().values())[-1]
        if not getattr(getattr(self._trainer, "datamodule", None), "is_streaming", False):
            return net(images)
        if self._stream is None:
            self._stream = Stream(net, len(images))  # type: ignore[arg-type]
        return self._stream.steps(images)

    def _load_start(self, pretrained: str | None, fresh: list[str] | None, dust3r: str | None) -> None:
        from restrike.checkpoints.start import load_dust3r, load_with_fresh_parts

        if pretrained:
            load_with_fresh_parts(self.net, pretrained, fresh or ())
        if dust3r:
            load_dust3r(self.net, dust3r, self.hparams.dust3r_encoder_only)

    def _parts(self, batch: MultiViewBatch) -> tuple[list[_Part], list[float]]:
        """The parts that have a backward pass each, and their shares of the batch."""
        parts, start = [], 0
        for part in scene_parts(batch, self.hparams.accum_steps):
            parts.append(_Part(part, start))
            start += len(part.images)
        return parts, [len(part.batch.images) / start for part in parts]

    def _inputs(self, part: _Part) -> Inputs:
        h, batch = self.hparams, part.batch
        if not h.is_metric:
            return Inputs()
        size = batch.images.shape[-2], batch.images.shape[-1]
        cameras = invert_se3(batch.world_to_camera)
        return draw_inputs(
            cameras, batch.intrinsics, size, batch.seed, h.mask_probabilities, h.released_ray_map, part.start
        )

    def _targets(self, batch: MultiViewBatch, inputs: Inputs) -> RecurrentTargets:
        is_metric = torch.full_like(batch.valid, self.hparams.is_metric)
        return batch_targets(batch, is_metric, inputs.image_mask)

    def _losses(self, predictions: Predictions, targets: RecurrentTargets) -> dict[str, Tensor]:
        h = self.hparams
        return recurrent_loss(
            predictions, targets, h.criterion == "mixed", h.alpha, h.color_weight, h.released_pose_mask
        )

    def _chunk_step(self, batch: MultiViewBatch, batch_idx: int) -> Tensor:
        """Loss of the next chunk of all parts; a new batch begins with its views that have no gradients."""
        parts, shares = self._parts(batch)
        if not self._sequences:
            self._sequences = [self._sequence(part) for part in parts]
        loss = self.loss_in_parts(self._sequences, shares, lambda sequence: sequence.next_losses()["loss"], batch_idx)
        if self._sequences[0].is_done:
            self._log_losses(batch, [sequence.mean_losses() for sequence in self._sequences], shares)
            self._sequences = []
        return loss

    def _sequence(self, part: _Part) -> TruncatedSequence:
        h, inputs = self.hparams, self._inputs(part)
        targets = self._targets(part.batch, inputs)
        with torch.no_grad():
            encoded = self.net.encode(part.batch.images, *inputs)
        return TruncatedSequence(
            self.net,
            encoded,
            lambda predictions, start, stop: self._losses(predictions, targets.views(start, stop)),
            h.chunk_views,
            h.trained_chunks,
        )

    def _log_losses(self, batch: MultiViewBatch, logged: list[dict[str, Tensor]], shares: list[float]) -> None:
        means = {
            f"train/{name}": sum(share * losses[name].mean() for share, losses in zip(shares, logged, strict=True))
            for name in logged[0]
        }
        self.log_dict({**means, "train/views": float(batch.images.shape[1])}, batch_size=len(batch.images))

    def _evaluate(
        self, batch: MultiViewBatch, stage: str, lengths: list[int | None], batch_idx: int
    ) -> dict[str, Any] | None:
        """In float32, as published. Returns the first batch and what is said of it, for pictures."""
        nets = self.competitors(stage)
        self._touched |= {(suffix, n) for suffix in (*nets, "_trivial") for n in lengths}  # also where all is padding
        if not bool(batch.valid.any()):
            return None
        batch = select_scenes(batch, batch.valid)
        targets = self._targets(batch, Inputs())
        with no_autocast(self.device):
            predictions = {suffix: net(batch.images) for suffix, net in nets.items()}
        predictions["_trivial"] = trivial_predictions(batch)
        for suffix, predicted in predictions.items():
            for n in lengths:
                part, true = Predictions(*(x[:, :n] for x in predicted)), targets.views(0, n or batch.images.shape[1])
                errors = recurrent_errors(part, true)
                self.metrics[_metrics_name(stage, suffix, n)].update(
                    SceneGeometry(decode_pose(part.poses), part.points_camera[..., 2], part.points_world),
                    SceneGeometry(true.poses, _known_depth(true), true.points_world),
                    {name: errors[name].mean() for name in _LOGGED_ERRORS},
                )
        if batch_idx:
            return None
        last = [name for name in nets if name != "_untrained"][-1]
        return {"batch": batch, **self._answer(batch, predictions[last])}

    def log_metrics(self, stage: str) -> None:
        """Of every network that took part."""
        for suffix, n in sorted(self._touched, key=str):
            metrics = self.metrics[_metrics_name(stage, suffix, n)]
            prefix = stage if n is None else f"{stage}/{n}_views"
            values = {f"{prefix}/{name}{suffix}": value.float() for name, value in metrics.compute().items()}
            self.log_dict(values, rank_zero_only=False, sync_dist=False)
            metrics.reset()
        self._touched.clear()


def batch_targets(batch: MultiViewBatch, is_metric: Tensor, image_mask: Tensor | None = None) -> RecurrentTargets:
    """What CUT3R learns of a batch: points of known depth; negative depth is sky."""
    valid = batch.valid_depth & (batch.depth > 0) & batch.depth.isfinite()
    sky = (batch.depth < 0) & batch.depth.isfinite()
    depth = torch.where(valid | sky, batch.depth, 0.0)  # the sky's points are behind the camera, as published
    camera_to_world = invert_se3(batch.world_to_camera)
    return recurrent_targets(
        unproject_depth(depth, batch.intrinsics, camera_to_world),
        camera_to_world,
        valid,
        sky,
        batch.images,
        is_metric=is_metric,
        image_mask=image_mask,
    )


def trivial_predictions(batch: MultiViewBatch) -> Predictions:
    """What one says who looks at no image: every camera where the first one is, every pixel at depth 1, all grey."""
    ones = torch.ones_like(batch.depth)
    points = unproject_depth(ones, batch.intrinsics)
    pose = torch.tensor([0.0, 0, 0, 1, 0, 0, 0], device=ones.device).expand(*ones.shape[:2], 7)
    return Predictions(points, ones, points, ones, torch.zeros_like(points), pose)


def _known_depth(targets: RecurrentTargets) -> Tensor:
    return torch.where(targets.valid, targets.points_camera[..., 2], 0.0)


def _metrics_name(stage: str, suffix: str, length: int | None) -> str:
    return stage + suffix + (f"_{length}_views" if length else "")
