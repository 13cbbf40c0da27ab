"""Image classification: one network, soft or hard targets, and whatever loss terms callbacks add."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_modules.base import TrainingModule
from lightning_modules.networks import classifier_names
from restrike.data.samples import ImageBatch
from restrike.losses import binary_cross_entropy, cross_entropy
from restrike.metrics import classification_metrics


class ClassificationModule(TrainingModule):
    """Trains and evaluates an image classifier.

    Args:
        model_name: One of Restrike's models (`faster_vit_0_224`) or any timm model.
        num_classes: Classes of the head.
        model_args: More constructor arguments of the model.
        drop_path_rate: Stochastic depth; null keeps the model's default.
        loss: "ce" (soft or hard cross-entropy) or "bce".
        label_smoothing: For hard targets; soft ones are smoothed when they are mixed.
        head_lr_factor: As `lr_factors`, for the classifier, whatever its name.
        training: Everything that all trainings share; see `TrainingModule`.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        model_args: dict[str, Any] | None = None,
        drop_path_rate: float | None = None,
        loss: Literal["ce", "bce"] = "ce",
        label_smoothing: float = 0.0,
        head_lr_factor: float = 1.0,
        **training: Any,
    ) -> None:
        drop_path = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
        super().__init__(model_name, {"num_classes": num_classes, **(model_args or {}), **drop_path}, **training)
        self.metrics = nn.ModuleDict(
            {stage + which: classification_metrics(f"{stage}/", which) for stage in _STAGES for which in ("", "_ema")}
        )

    def setup(self, stage: str) -> None:
        """Check the data against the head."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if stage != "predict" and classes not in (None, self.hparams.num_classes):
            raise ValueError(f"model.num_classes is {self.hparams.num_classes}, but the data has {classes} classes")
        super().setup(stage)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of normalised images [B, 3, H, W]."""
        return self._logits(self.net, images)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Loss on the targets, plus each registered term."""
        logits = self(batch.images)
        losses = {self.hparams.loss: self._loss(logits, batch.targets)}
        for name, term in self.loss_terms.items():
            losses[name] = term(self, batch, logits)
        loss = torch.stack(list(losses.values())).sum()
        logged = {f"train/loss_{name}": value.detach() for name, value in losses.items()}
        self.log_dict({"train/loss": loss.detach(), **logged}, batch_size=len(batch.images))
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Metrics of the raw and the averaged weights; returns the logits of the better one, the average."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """As in validation, under test/."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Any]:
        """The five most probable classes of each image: keys, classes [B, 5], probabilities [B, 5]."""
        net = list(self.evaluated().values())[-1]
        probabilities = self._logits(net, batch.images).float().softmax(dim=1)[batch.valid]
        values, classes = probabilities.topk(min(5, probabilities.shape[1]), dim=1)
        keys = [key for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid]
        return {"keys": keys, "classes": classes, "probabilities": values}

    def name_lr_factors(self) -> dict[str, float]:
        """The head's comes first, so that no wider glob takes it."""
        head = {}
        if self.hparams.head_lr_factor != 1.0:
            head = {f"{name}.*": self.hparams.head_lr_factor for name in classifier_names(self.net)}
        return head | super().name_lr_factors()

    def _logits(self, net: nn.Module, images: Tensor) -> Tensor:
        if self.hparams.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return net(images)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        function = cross_entropy if self.hparams.loss == "ce" else binary_cross_entropy
        return function(logits, targets, label_smoothing=self.hparams.label_smoothing)

    def _evaluate(self, batch: ImageBatch, stage: str) -> dict[str, Tensor]:
        for suffix, net in self.evaluated().items():
            logits = self._logits(net, batch.images)
            metrics = self.metrics[stage + suffix]
            metrics.update(logits, batch.targets, batch.valid)
            self.log_dict(metrics, batch_size=len(batch.images))
        return {"logits": logits}


_STAGES = ("val", "test")
