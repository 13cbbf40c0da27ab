"""VGGT: cameras, depth and points of all views of a scene in one pass (arXiv 2503.11651).

Truth is normalised, predictions never: the network has to find the scale of its scene by itself. A batch may go
through the network in several parts (`accum_steps`), as in the release; unlike there, no scene is lost where the
parts are uneven, as each counts by its scenes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.baselines import ComparesWithBaselines
from restrike.data.multiview_filter import SEEN, UNSEEN
from restrike.data.predicted_views import PredictedViews, whole_photo_intrinsics
from restrike.data.samples import MultiViewBatch
from restrike.geometry import decode_pose_fov, invert_se3, normalize_to_mean_distance, unproject_depth
from restrike.losses import LossWeights, MultiViewTargets, multiview_loss
from restrike.losses.camera import CameraDistance
from restrike.losses.dense import SurfaceTerm
from restrike.metrics import MultiViewMetrics
from restrike.metrics.camera_pose import RelativePose
from restrike.metrics.multiview import trivial_cameras

_CATEGORIES = (*SEEN, *UNSEEN, "other")
_STAGES = ("val", "test")
_BASELINES = ("_untrained", "_other_images", "_trivial")


class MultiViewReconstructionModule(ComparesWithBaselines):
    """Trains and evaluates VGGT.

    Validation and test log `rra@`, `rta@`, `auc@`, depth errors after the ratio of medians, and the losses; test also
    the errors of points lifted from depth and cameras, and the same numbers of two baselines: identity poses with one
    depth for all (`_trivial`), and a network with other random weights (`_untrained`).

    Args:
        model_name: "vggt_1b", "vggt_1b_camera_depth" or another multi-view model.
        model_args: More constructor arguments of the model.
        patch_embed_pretrained: DINOv2's released file, for the embedder alone; the rest starts from random weights.
        camera_weight: Weight of the camera loss; 0 leaves a head out of the loss.
        depth_weight: Of the depth loss.
        point_weight: Of the point loss.
        track_weight: Of the track loss; its targets come with no data set here.
        camera_distance: "l1" (the release), "l2" or "huber" (the paper).
        depth_surface: What of the depth's neighbours counts: "grad", "grad_conf", "normal", "normal_conf" or "".
        point_surface: The same for points.
        valid_range: Quantile of residuals above which they are left out.
        accum_steps: Parts that a batch goes through the network in, each with its own backward pass; along scenes.
        relative_pose: Of the reported accuracies: "released" or "camera" (docs/protocols.md).
        test_points: Points of each cloud that are compared in a test.
        test_untrained: Evaluate a network of random weights, too, in a test.
        test_other_images: Evaluate the network on the images of another scene, too, in a test.
        training: Everything that all trainings share; see `TrainingModule`.
    """

    def __init__(
        self,
        model_name: str,
        model_args: dict[str, Any] | None = None,
        patch_embed_pretrained: str | None = None,
        camera_weight: float = 5.0,
        depth_weight: float = 1.0,
        point_weight: float = 0.0,
        track_weight: float = 0.0,
        camera_distance: CameraDistance = "l1",
        depth_surface: SurfaceTerm = "grad",
        point_surface: SurfaceTerm = "normal",
        valid_range: float = 0.98,
        accum_steps: int = 1,
        relative_pose: RelativePose = "released",
        test_points: int = 4096,
        test_untrained: bool = False,
        test_other_images: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(model_name, model_args, **training)
        if accum_steps < 1:
            raise ValueError(f"model.accum_steps: expected 1 or more, got {accum_steps}")
        if patch_embed_pretrained is not None:
            from restrike.checkpoints import load_released

            load_released(self.net.aggregator.patch_embed, patch_embed_pretrained)
        self.loss_weights = LossWeights(camera_weight, depth_weight, point_weight, track_weight)
        names = ("loss", *(f"loss_{name}" for name, weight in self.loss_weights._asdict().items() if weight))
        self.metrics = nn.ModuleDict(
            {
                stage + suffix: MultiViewMetrics(
                    _CATEGORIES,
                    () if suffix == "_trivial" else names,
                    relative_pose,
                    points=stage == "test",
                    max_points=test_points,
                )
                for stage in _STAGES
                for suffix in ("", "_ema", *_BASELINES)
            }
        )
        self._touched: set[str] = set()

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Predictions of images [B, V, 3, H, W] in [0, 1]; see `restrike.models.vggt.VGGT`."""
        return self.net(images)

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> Tensor:
        """Loss of the batch, in `accum_steps` parts along its scenes."""
        parts = list(scene_parts(batch, self.hparams.accum_steps))
        shares = [len(part.images) / len(batch.images) for part in parts]
        found: list[dict[str, Tensor]] = []

        def loss_of(part: MultiViewBatch) -> Tensor:
            losses = self.losses(self(part.images), multiview_targets(part))
            found.append({name: value.detach() for name, value in losses.items()})
            return losses["loss"]

        loss = self.loss_in_parts(parts, shares, loss_of, batch_idx)
        scenes, views = batch.images.shape[:2]
        logged = {
            f"train/{name}": torch.stack(
                [share * losses[name] for share, losses in zip(shares, found, strict=True)]
            ).sum()
            for name in found[0]
        }
        self.log_dict(logged, batch_size=scenes)
        self.log_dict({"train/views": float(views), "train/scenes": float(scenes)}, batch_size=1)
        return loss

    def losses(self, predictions: dict[str, Any], targets: MultiViewTargets) -> dict[str, Tensor]:
        """The objective "loss" and its parts."""
        h = self.hparams
        return multiview_loss(
            predictions,
            targets,
            self.loss_weights,
            h.camera_distance,
            h.depth_surface,
            h.point_surface,
            h.valid_range,
        )

    def validation_step(self, batch: MultiViewBatch, batch_idx: int) -> dict[str, Any] | None:
        """Metrics of the raw and the averaged weights, and of the trivial predictor."""
        return self.predict_step(batch, batch_idx) if self.predicts_only else self._evaluate(batch, "val", batch_idx)

    def test_step(self, batch: MultiViewBatch, batch_idx: int) -> dict[str, Any] | None:
        """As in validation, with points and perhaps the untrained network."""
        return self.predict_step(batch, batch_idx) if self.predicts_only else self._evaluate(batch, "test", batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Predictions of a batch of scenes, with `world_to_camera` [B, V, 3, 4] and `intrinsics` [B, V, 3, 3], and the
        same as `PredictedViews` where the network has a depth head."""
        return self._answer(batch, list(self.evaluated().values())[-1](batch.images))

    def _answer(self, batch: Any, predictions: dict[str, Any]) -> dict[str, Any]:
        size = batch.images.shape[-2], batch.images.shape[-1]
        cameras, intrinsics = decode_pose_fov(predictions["pose_enc"], size)
        said = {"keys": batch.keys, **predictions, "world_to_camera": cameras, "intrinsics": intrinsics}
        if "depth" in predictions:
            whole = whole_photo_intrinsics(intrinsics, batch.crop_boxes, size)
            depth, confidence = predictions["depth"][..., 0].float(), predictions["depth_conf"].float()
            said["views"] = PredictedViews(cameras, whole, depth, confidence)
        return said

    def _evaluate(self, batch: MultiViewBatch, stage: str, batch_idx: int) -> dict[str, Any] | None:
        """Returns the first batch and what is said of it, for pictures."""
        nets = self.competitors(stage)
        self._touched = {*nets, "_trivial"}  # on every rank, also where all rows are padding
        if not bool(batch.valid.any()):
            return None
        shown: dict[str, Any] | None = None
        batch = select_scenes(batch, batch.valid)
        targets = multiview_targets(batch)
        true_depth = torch.where(targets.valid, targets.depth, 0.0)
        categories = [category_of(key) for key in batch.keys]
        size = true_depth.shape[-2], true_depth.shape[-1]
        for suffix, net in nets.items():
            predictions = net(batch.images)
            if batch_idx == 0 and suffix != "_untrained":
                shown = {"batch": batch, **self._answer(batch, predictions)}
            cameras, intrinsics = decode_pose_fov(predictions["pose_enc"], size)
            losses = self.losses(predictions, targets)
            metrics = self.metrics[stage + suffix]
            metrics.update(
                (cameras, targets.world_to_camera),
                (predictions["depth"][..., 0].float(), true_depth),
                (intrinsics, targets.intrinsics),
                categories,
                losses,
            )
        self.metrics[f"{stage}_trivial"].update(
            (trivial_cameras(targets.world_to_camera), targets.world_to_camera),
            (torch.ones_like(true_depth), true_depth),
            (targets.intrinsics, targets.intrinsics),
            categories,
        )
        return shown

    def log_metrics(self, stage: str) -> None:
        """Of every network that took part."""
        for suffix in sorted(self._touched):
            metrics = self.metrics[stage + suffix]
            values = {f"{stage}/{name}{suffix}": value.float() for name, value in metrics.compute().items()}
            self.log_dict(values, rank_zero_only=False, sync_dist=False)
            metrics.reset()


def multiview_targets(batch: MultiViewBatch) -> MultiViewTargets:
    """What VGGT learns of a batch: the first camera is the world, the mean distance of points from it the unit."""
    depth = torch.where(batch.valid_depth, batch.depth, 0.0)
    points = unproject_depth(depth, batch.intrinsics, invert_se3(batch.world_to_camera))
    valid = batch.valid_depth & points.isfinite().all(-1)
    scene = normalize_to_mean_distance(batch.world_to_camera, points, depth, valid)
    return MultiViewTargets(scene.world_to_camera, batch.intrinsics, scene.depth, scene.points_world, valid)


def scene_parts(batch: MultiViewBatch, parts: int) -> Iterator[MultiViewBatch]:
    """A batch in at most `parts` parts along its scenes, as even as can be; none is empty."""
    count = len(batch.images)
    if parts <= 1 or count == 1:
        yield batch
        return
    for rows in torch.arange(count).tensor_split(min(parts, count)):
        mask = torch.zeros(count, dtype=torch.bool)
        mask[rows] = True
        yield select_scenes(batch, mask)


def select_scenes(batch: MultiViewBatch, mask: Tensor) -> MultiViewBatch:
    """The scenes where `mask` [B]."""
    if bool(mask.all()):
        return batch
    chosen = mask.nonzero()[:, 0]
    rows = {name: x[chosen.to(x.device)] for name, x in batch._asdict().items() if isinstance(x, Tensor)}
    return batch._replace(**rows, keys=[batch.keys[i] for i in chosen.tolist()])


def category_of(key: str) -> str:
    """CO3D's category of a scene's key "<category>/<sequence>"; "other" where it is none of them."""
    category = key.partition("/")[0]
    return category if category in _CATEGORIES else "other"
