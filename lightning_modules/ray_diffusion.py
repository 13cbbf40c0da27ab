"""DiffusionSfM: cameras and geometry of a scene as the diffusion of its rays (arXiv 2505.05473).

The network sees noisy rays and predicts clean ones; the loss is their squared error where depth is known. Targets,
noise and cameras are float32 whatever the precision of the network (the release computes them in bf16), and the noise
of a step follows from (seed, epoch, step, rank), so a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_modules.baselines import ComparesWithBaselines
from lightning_modules.multiview_reconstruction import category_of, select_scenes
from lightning_modules.networks import build_network
from lightning_modules.ray_scores import SceneScores, fingerprint, first_views, score_scenes
from restrike.checkpoints import load_released, safe_load
from restrike.checkpoints.load import select_state_dict
from restrike.data.multiview_filter import SEEN, UNSEEN
from restrike.data.predicted_views import PredictedViews
from restrike.data.samples import MultiViewBatch
from restrike.geometry import RayCameras, decode_rays, transform_points
from restrike.geometry.ray_cameras import Center
from restrike.losses import ray_loss
from restrike.metrics import CameraCenterAccuracy, PoseAccuracy
from restrike.metrics.multiview import trivial_cameras
from restrike.metrics.pose_table import SceneScore
from restrike.models.diffusionsfm import (
    DiffusionSfM,
    RaySamples,
    RayTargets,
    cameras_from_ray_map,
    dense_from_sparse,
    ndc_coordinates,
    ray_targets,
    sample_rays,
)
from restrike.models.diffusionsfm.cameras import Solver
from restrike.models.diffusionsfm.targets import ViewCameras
from restrike.models.layers.derived import derived_buffer_names
from restrike.optim.loss_scale import LossScale

_TIMM_ENCODER = "vit_small_patch14_dinov2.lvd142m"
_CATEGORIES = (*SEEN, *UNSEEN, "other")
_SUFFIXES = ("", "_ema", "_trivial")


class RayDiffusionModule(ComparesWithBaselines):
    """Trains, samples and evaluates DiffusionSfM.

    Validation logs the loss at fixed times and noise, `val/rra@15`, `val/center_acc@0.1` and the like of cameras
    sampled with the early stop, and the same of identity poses (`_trivial`). Test prints the published table; it keeps
    each scene's score in the run folder, and goes on from there when it is started again. On request it prints the same
    table of baselines: random weights (`_untrained`), the network on another scene's images (`_other_images`), and,
    where the data has found one, the mean motion of the training sequences (`_mean_motion`).

    Args:
        model_name: "diffusionsfm_sparse" or "diffusionsfm_dense".
        model_args: More constructor arguments of the model.
        encoder_pretrained: DINOv2 ViT-S/14's weights for the image encoder: a file (timm's or the release's), or "timm"
            to let timm download them. null: random.
        sparse_pretrained: A sparse model's file (a released one or an own run's) that a dense model starts from; its
            ray embedding is spread over the patch, and the decoder starts anew.
        clipping: "clean": trainer.gradient_clip_val is what it says. "faithful": of gradients that are 65536 times as
            large, as the release has it (`restrike.optim.loss_scale`); the rate then falls as its loss scale grows.
        loss_scale_restart: Optimiser step at which the faithful loss scale starts anew (the release's 50000).
        num_steps: Times of a whole sampling trajectory.
        num_calls: Calls of the network after which sampling stops; null: 11 of 100.
        solver: Of cameras from rays: "robust", "linear" or "released"; see `cameras_from_ray_map`.
        center: Camera centre: "mean" of the origins or "intersection" of the rays.
        test_views: Rows of the test's table: how many views of a scene are shown.
        test_points: Points of a cloud that a test compares at most, taken evenly; null: all, as published.
        test_untrained: Evaluate a network of random weights, too, in a test.
        test_other_images: Evaluate the network on the images of another scene, too, in a test.
        training: Everything that all trainings share; see `TrainingModule`.
    """

    net: DiffusionSfM

    def __init__(
        self,
        model_name: str,
        model_args: dict[str, Any] | None = None,
        encoder_pretrained: str | None = None,
        sparse_pretrained: str | None = None,
        clipping: Literal["clean", "faithful"] = "clean",
        loss_scale_restart: int | None = None,
        num_steps: int = 100,
        num_calls: int | None = None,
        solver: Solver = "robust",
        center: Center = "mean",
        test_views: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
        test_points: int | None = None,
        test_untrained: bool = False,
        test_other_images: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(model_name, model_args, **training)
        if encoder_pretrained is not None:
            load_encoder(self.net, encoder_pretrained)
        if sparse_pretrained is not None:
            load_sparse(self.net, sparse_pretrained)
        self.loss_scale = LossScale() if clipping == "faithful" else None
        self.metrics = nn.ModuleDict({f"pose{s}": PoseAccuracy(groups=_CATEGORIES) for s in _SUFFIXES})
        self.metrics.update({f"center{s}": CameraCenterAccuracy(groups=_CATEGORIES) for s in _SUFFIXES})
        self.metrics.update({f"loss{s}": MeanMetric() for s in ("", "_ema")})
        self._touched: set[str] = set()
        self._scores: dict[str, SceneScores] = {}

    def forward(self, images: Tensor, coords: Tensor) -> RaySamples:
        """Rays of normalised images [B, V, 3, H, W] with patch coordinates [B, V, 2, h, w], by sampling."""
        return self.sample(list(self.evaluated().values())[-1], images, coords)

    def sample(self, net: Any, images: Tensor | None, coords: Tensor, **options: Any) -> RaySamples:
        """`sample_rays` with this module's steps."""
        settings = {"num_steps": self.hparams.num_steps, "num_calls": self.hparams.num_calls}
        return sample_rays(net, coords, images, **{**settings, **options})

    def training_step(self, batch: MultiViewBatch, batch_idx: int) -> Tensor:
        """Noise the rays of a batch at random times, predict the clean ones, compare where depth is known."""
        loss = self.diffusion_loss(self.net, batch, targets_of(batch), seed=batch.seed)
        self.log("train/loss", loss.detach(), batch_size=len(batch.images))
        self.log("train/views", float(batch.images.shape[1]), batch_size=1)
        return loss

    def diffusion_loss(self, net: Any, batch: MultiViewBatch, targets: RayTargets, seed: int) -> Tensor:
        """The objective at times and noise that `seed` gives."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        schedule, rays, device = self.net.noise_scheduler, targets.rays, self.device
        times = torch.randint(schedule.max_timesteps, (len(rays),), generator=generator, device=device)
        noise = torch.randn(rays.shape, generator=generator, device=device)
        noisy = schedule.add_noise(rays, noise, times) * batch.valid_depth[:, :, None]
        predicted = net(batch.images, noisy, coords_of(batch, self.net.width), times, batch.valid_depth)
        return ray_loss(predicted, rays, batch.valid_depth)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip true gradients, or those that the release's loss scale has enlarged; log the true norm before it."""
        if self.loss_scale is None or not gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        if self.trainer.global_step == self.hparams.loss_scale_restart:
            self.loss_scale.restart()
        norm = self.loss_scale.clip(self.parameters(), gradient_clip_val)
        self.log("train/loss_scale", self.loss_scale.scale)
        if norm is not None:
            self.log("train/grad_norm", norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The loss scale goes with the run."""
        if self.loss_scale is not None:
            checkpoint["loss_scale"] = self.loss_scale.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with it."""
        if self.loss_scale is not None and "loss_scale" in checkpoint:
            self.loss_scale.load_state_dict(checkpoint["loss_scale"])

    def validation_step(self, batch: MultiViewBatch, batch_idx: int) -> dict[str, Any]:
        """Loss and cameras of the raw and the averaged weights; returns sampled and true rays for pictures."""
        if self.predicts_only:
            return self.predict_step(batch, batch_idx)
        nets = self.evaluated()
        self._touched |= {*nets, "_trivial"}  # on every rank, also where all rows are padding
        if not bool(batch.valid.any()):
            return {}
        batch = select_scenes(batch, batch.valid)
        coords, targets = coords_of(batch, self.net.width), targets_of(batch)
        for suffix, net in nets.items():
            loss = self.diffusion_loss(net, batch, targets, seed=batch_idx)
            self.metrics[f"loss{suffix}"].update(loss, weight=len(batch.keys))
            rays = self.sample(net, batch.images, coords).prediction
            self._score(suffix, self.cameras(rays, batch).world_to_camera, batch)
        self._score("_trivial", trivial_cameras(batch.world_to_camera), batch)
        return {"batch": batch, "rays": rays, "true_rays": targets.rays}

    def log_metrics(self, stage: str) -> None:
        """Log what the ranks have summed; of a test also print the tables and write them into the run folder."""
        if stage == "test":
            self._log_tables()
            return
        for suffix in sorted(self._touched):
            kinds = ("pose", "center") if suffix == "_trivial" else ("pose", "center", "loss")
            values: dict[str, Tensor] = {}
            for metric in (self.metrics[kind + suffix] for kind in kinds):
                result = metric.compute()
                values |= result if isinstance(result, dict) else {"loss": result}
                metric.reset()
            self.log_dict({f"val/{name}{suffix}": value.float() for name, value in values.items()}, sync_dist=False)

    def on_test_start(self) -> None:
        """Find what an earlier test of the same weights and settings has scored."""
        if self.predicts_only:
            return
        folder, identity = Path(self.trainer.default_root_dir) / "test", self._test_identity(self._tested())
        self._scores = {"": SceneScores(folder, identity, self.global_rank)}
        for suffix, title in self._baselines().items():
            self._scores[suffix] = SceneScores(folder, identity | {"baseline": suffix}, self.global_rank, title)

    def test_step(self, batch: MultiViewBatch, batch_idx: int) -> dict[str, Any] | None:
        """Score each scene with its first 2, 3, … views, unless it was scored before."""
        if self.predicts_only:
            return self.predict_step(batch, batch_idx)
        for suffix, kept in self._scores.items():
            wanted = batch.valid.cpu() & torch.tensor([not kept.has(key) for key in batch.keys])
            if bool(wanted.any()):
                part = select_scenes(batch, wanted)
                kept.add(part.keys, self._scores_of(suffix, part))
        return None

    def _scores_of(self, suffix: str, batch: MultiViewBatch) -> list[list[SceneScore]]:
        """Of each scene, for each number of views, what the network or a baseline gets."""
        net = self.competitors("test")["_untrained"] if suffix == "_untrained" else self._tested()
        is_network = suffix != "_mean_motion"
        images = batch.images.roll(1, dims=0) if suffix == "_other_images" else batch.images
        features = net.encode(images) if is_network else None
        coords = coords_of(batch, self.net.width)
        scales = getattr(self.trainer.datamodule, "scene_scales", {})
        scores: list[list[SceneScore]] = [[] for _ in batch.keys]
        for views in (n for n in self.hparams.test_views if n <= batch.images.shape[1]):
            part, rays = first_views(batch, views), None
            if features is None:
                cameras = self.trainer.datamodule.mean_motion[:views].to(self.device).expand(len(batch.keys), -1, 3, 4)
            else:
                kept = features.views(torch.arange(views, device=self.device))
                rays = self.sample(net, None, coords[:, :views], features=kept).prediction
                cameras = self.cameras(rays, part).world_to_camera
            for row, score in zip(
                scores, score_scenes(part, rays, cameras, scales, self.hparams.test_points), strict=True
            ):
                row.append(score)
        return scores

    def _tested(self) -> Any:
        return list(self.evaluated().values())[-1]

    def _baselines(self) -> dict[str, str]:
        """Suffix and title of what stands beside the network in a test."""
        found = {
            "_untrained": (self.hparams.test_untrained, "Random weights:"),
            "_other_images": (self.hparams.test_other_images, "The network on another scene's images:"),
            "_mean_motion": (
                getattr(self.trainer.datamodule, "mean_motion", None) is not None,
                "The mean motion of the training sequences, whatever the images:",
            ),
        }
        return {suffix: title for suffix, (is_wanted, title) in found.items() if is_wanted}

    def _log_tables(self) -> None:
        if self.predicts_only:
            return
        self.trainer.strategy.barrier("scores")
        for suffix, scores in self._scores.items():
            values = scores.summarize(is_writer=self.trainer.is_global_zero)
            self.log_dict({f"test/{name}{suffix}": value for name, value in values.items()}, sync_dist=False)

    def predict_step(self, batch: MultiViewBatch, batch_idx: int) -> dict[str, Any]:
        """Of a batch of scenes: keys, rays [B, V, 8, P, P], world_to_camera [B, V, 3, 4] and intrinsics [B, V, 3, 3] in
        pixels of the whole pictures, and as `PredictedViews`; the world is the first camera's, in PyTorch3D's axes."""
        rays = self(batch.images, coords_of(batch, self.net.width)).prediction
        cameras = self.cameras(rays, batch)
        _, endpoints = decode_rays(rays)
        depth = transform_points(cameras.world_to_camera, endpoints)[..., 2]
        views = PredictedViews(*cameras, depth)
        return {"keys": batch.keys, "rays": rays, **cameras._asdict(), "views": views}

    def cameras(self, rays: Tensor, batch: MultiViewBatch) -> RayCameras:
        """Cameras of rays [B, V, 8, P, P]; what the data knows of intrinsics is not used."""
        solver, center = self.hparams.solver, self.hparams.center
        return cameras_from_ray_map(rays, batch.crop_boxes, batch.source_sizes, solver=solver, center=center)

    def _score(self, suffix: str, cameras: Tensor, batch: MultiViewBatch) -> None:
        groups = [category_of(key) for key in batch.keys]
        self.metrics[f"pose{suffix}"].update(cameras, batch.world_to_camera, groups)
        self.metrics[f"center{suffix}"].update(cameras, batch.world_to_camera, None, groups)

    def _test_identity(self, net: nn.Module) -> dict[str, Any]:
        """What a score depends on beside the scene."""
        names = ("model_name", "num_steps", "num_calls", "solver", "center", "test_points")
        settings = {name: self.hparams[name] for name in names}
        return {**settings, "test_views": list(self.hparams.test_views), "weights": fingerprint(net)}


def targets_of(batch: MultiViewBatch) -> RayTargets:
    """Clean rays of a batch."""
    size = batch.images.shape[-1]
    cameras = ViewCameras(batch.world_to_camera, batch.intrinsics, batch.crop_boxes, batch.source_sizes, size)
    return ray_targets(cameras, batch.depth)


def coords_of(batch: MultiViewBatch, width: int) -> Tensor:
    """NDC of the patch centres, [B, V, 2, width, width]."""
    return ndc_coordinates(batch.crop_boxes, batch.source_sizes, width)


def load_encoder(net: DiffusionSfM, source: str) -> None:
    """DINOv2's weights into the image encoder.

    Raises:
        ValueError: weights of another network, or timm cannot download them.
    """
    encoder = net.feature_extractor.model
    if source == "timm":
        state = build_network(_TIMM_ENCODER, download=True, num_classes=0).state_dict()
        missing, unexpected = encoder.load_state_dict(state, strict=False)
    else:
        missing, unexpected = load_released(encoder, source, strict=False)
    # It serves DINOv2's own training only; timm leaves it out.
    missing = [name for name in missing if name != "mask_token"]
    if missing or unexpected:
        raise ValueError(
            f"model.encoder_pretrained: {source} is not DINOv2 ViT-S/14 without registers: it lacks {missing[:3]} and "
            f"adds {unexpected[:3]}; timm's is {_TIMM_ENCODER}"
        )


def load_sparse(net: DiffusionSfM, path: str) -> None:
    """The start of a dense model from a sparse one's file.

    Raises:
        ValueError: `net` is sparse, or the file is not of a sparse model of the same sizes.
    """
    if not net.is_dense:
        raise ValueError("model.sparse_pretrained is for diffusionsfm_dense; a sparse model takes model.pretrained")
    try:
        state = dense_from_sparse(select_state_dict(safe_load(path), path))
    except ValueError as error:
        raise ValueError(f"model.sparse_pretrained: {path}: {error}") from error
    derived, own = set(derived_buffer_names(net)), net.state_dict()
    state = {name: value for name, value in state.items() if name not in derived}
    wrong = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    unread = ("scratch.", "project_opers.")
    wrong += [name for name in own if name not in state and name not in derived and not name.startswith(unread)]
    if wrong:
        raise ValueError(f"model.sparse_pretrained: {path} is of another model; {wrong[0]} differs or is missing")
    net.load_state_dict(state, strict=False)
