"""Image classification: one network, soft or hard targets, and whatever loss terms callbacks add.

The weight average (EMA) is no submodule. A callback owns it and hands over a closure in `averaged`, so it stays out of
the optimiser, DDP and this module's state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_modules.networks import (
    CompileScope,
    build_network,
    checkpoint_activations,
    classifier_names,
    compile_network,
)
from lightning_modules.schedule_lengths import ScheduleLengths, schedule_lengths
from lightning_modules.sharding import is_sharded, shard_network
from restrike.data.samples import ImageBatch
from restrike.losses import binary_cross_entropy, cross_entropy
from restrike.metrics import classification_metrics
from restrike.models.layers.derived import exclude_derived_from_ddp
from restrike.optim import (
    clip_gradients,
    create_optimizer,
    lr_scheduler,
    make_schedule,
    param_groups,
    scale_weight_decay,
)
from restrike.optim.batch_scaling import WeightDecayRule
from restrike.optim.schedules import ScheduleName

LossTerm = Callable[[LightningModule, ImageBatch, Tensor], Tensor]


class ClassificationModule(LightningModule):
    """Trains and evaluates an image classifier.

    Args:
        model_name: One of Restrike's models (`faster_vit_0_224`) or any timm model.
        model_args: More constructor arguments of the model.
        num_classes: Classes of the head.
        drop_path_rate: Stochastic depth; null keeps the model's default.
        pretrained: A released weight file to start from, or "timm" to let timm download those of `model_name`.
        pretrained_ema: Take the EMA weights of that file.
        pretrained_strict: Refuse a file that lacks or adds a weight; false implies `pretrained_adapt`.
        pretrained_adapt: Leave out a head of another size (or a missing one) and fit position tables and the first
            convolution to this model; everything else must still be there.
        loss: "ce" (soft or hard cross-entropy) or "bce".
        label_smoothing: For hard targets; soft ones are smoothed when they are mixed.
        optimizer: timm's name: adamw, lamb, sgd, …
        lr: Peak learning rate, at the reference batch size if a callback scales it.
        lr_factors: Glob over parameter names (net.patch_embed.*) → factor on their learning rate.
        head_lr_factor: The same for the classifier, whatever its name.
        layer_decay: Factor on the learning rate per layer below the head; null for none.
        weight_decay: For tensors of two or more dimensions.
        weight_decay_rule: "constant", or "normalized": times √(1 / optimiser steps of the run), as iFAM does.
        betas: null keeps the optimiser's default.
        eps: null keeps the optimiser's default.
        optimizer_args: More arguments of the optimiser, such as momentum or fused.
        schedule: warmup_cosine (FasterViT's, unshifted), cosine, one_cycle or constant.
        warmup_epochs: Length of the warm-up.
        warmup_steps: The same in optimiser steps.
        warmup_lr: Where the warm-up starts.
        min_lr: Where the schedule ends; also the rate of the cooldown.
        schedule_epochs: Length of the schedule, warm-up included; null for the whole run. What trainer.max_epochs
            goes beyond it is cooldown.
        schedule_steps: The same in optimiser steps.
        schedule_steps_per_epoch: Optimiser steps that count as one epoch of the schedule; null counts this run's.
        evaluate: Which weights validation and test use: the raw ones, the EMA's, or both.
        channels_last: Memory layout of images and convolutions.
        grad_checkpointing: Compute activations again in the backward pass instead of keeping them.
        compile: torch.compile "none", each of the repeated "blocks", or the whole "net", in place.
        compile_args: Arguments of torch.compile.
        float32_matmul_precision: "high" allows TF32.
    """

    averaged: Callable[[], nn.Module] | None = None  # set by the EMA callback
    lr_factor: float = 1.0  # set by the LR scaling callback, before configure_optimizers

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        model_args: dict[str, Any] | None = None,
        drop_path_rate: float | None = None,
        pretrained: str | None = None,
        pretrained_ema: bool = False,
        pretrained_strict: bool = True,
        pretrained_adapt: bool = False,
        loss: Literal["ce", "bce"] = "ce",
        label_smoothing: float = 0.0,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        lr_factors: dict[str, float] | None = None,
        head_lr_factor: float = 1.0,
        layer_decay: float | None = None,
        weight_decay: float = 0.05,
        weight_decay_rule: WeightDecayRule = "constant",
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        optimizer_args: dict[str, Any] | None = None,
        schedule: ScheduleName = "cosine",
        warmup_epochs: float = 0.0,
        warmup_steps: int | None = None,
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        schedule_epochs: float | None = None,
        schedule_steps: int | None = None,
        schedule_steps_per_epoch: int | None = None,
        evaluate: Literal["raw", "ema", "both"] = "both",
        channels_last: bool = False,
        grad_checkpointing: bool = False,
        compile: CompileScope = "none",
        compile_args: dict[str, Any] | None = None,
        float32_matmul_precision: Literal["highest", "high", "medium"] = "highest",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        arguments = {"num_classes": num_classes, **(model_args or {})}
        if drop_path_rate is not None:
            arguments["drop_path_rate"] = drop_path_rate
        self.net = build_network(model_name, download=pretrained == "timm", **arguments)
        if pretrained not in (None, "timm"):
            from restrike.checkpoints import load_released

            adapt = pretrained_adapt or not pretrained_strict
            load_released(self.net, pretrained, strict=pretrained_strict, use_ema=pretrained_ema, adapt=adapt)
        if grad_checkpointing:
            checkpoint_activations(self.net)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        exclude_derived_from_ddp(self)
        self.loss_terms: dict[str, LossTerm] = {}
        self.metrics = nn.ModuleDict(
            {stage + which: classification_metrics(f"{stage}/", which) for stage in _STAGES for which in ("", "_ema")}
        )

    def setup(self, stage: str) -> None:
        """Check the data against the head, then compile."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if stage != "predict" and classes not in (None, self.hparams.num_classes):
            raise ValueError(f"model.num_classes is {self.hparams.num_classes}, but the data has {classes} classes")
        torch.set_float32_matmul_precision(self.hparams.float32_matmul_precision)
        if stage == "fit":
            compile_network(self.net, self.hparams.compile, **(self.hparams.compile_args or {}))

    def configure_model(self) -> None:
        """Shard the network where the strategy is `ModelParallelStrategy`; otherwise, or a second time, do nothing.

        Raises:
            ValueError: the strategy asks for tensor parallelism, or callbacks.ema is on, whose copy is not sharded.
        """
        if not isinstance(self.trainer.strategy, ModelParallelStrategy) or is_sharded(self.net):
            return
        if self.averaged is not None:
            raise ValueError(
                "callbacks.ema keeps a whole copy of the network, but this strategy splits it: ~callbacks.ema or DDP"
            )
        shard_network(self.net, self.device_mesh)

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
        net = list(self._evaluated().values())[-1]
        probabilities = self._logits(net, batch.images).float().softmax(dim=1)[batch.valid]
        values, classes = probabilities.topk(min(5, probabilities.shape[1]), dim=1)
        keys = [key for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid]
        return {"keys": keys, "classes": classes, "probabilities": values}

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser over its parameter groups, and the schedule of its steps."""
        h = self.hparams
        extra = h.optimizer_args or {}
        if extra.get("fused") and self.trainer.precision == "16-mixed":
            raise ValueError("a fused optimizer unscales gradients itself, so they cannot be clipped under 16-mixed")
        lengths = self._lengths()
        weight_decay = scale_weight_decay(h.weight_decay_rule, h.weight_decay, lengths.total_steps)
        groups = param_groups(self.net, weight_decay, self._lr_factors(), h.layer_decay)
        optimizer = create_optimizer(h.optimizer, groups, h.lr * self.lr_factor, 0.0, h.betas, h.eps, **extra)
        schedule = make_schedule(
            h.schedule,
            lr=h.lr,
            total_steps=lengths.total_steps,
            warmup_steps=lengths.warmup_steps,
            warmup_lr=h.warmup_lr,
            min_lr=h.min_lr,
        )
        scheduler = lr_scheduler(optimizer, schedule, h.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, and log the norm before it."""
        by_value = gradient_clip_algorithm == "value"
        norm = clip_gradients(self.parameters(), None if by_value else gradient_clip_val or None)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if norm is not None:
            self.log("train/grad_norm", norm)

    def _lengths(self) -> ScheduleLengths:
        h = self.hparams
        return schedule_lengths(
            self.trainer,
            warmup_epochs=h.warmup_epochs,
            warmup_steps=h.warmup_steps,
            schedule_epochs=h.schedule_epochs,
            schedule_steps=h.schedule_steps,
            per_epoch=h.schedule_steps_per_epoch,
        )

    def _lr_factors(self) -> dict[str, float]:
        """Factors by glob over the names of `net`; the head's first, so that no wider glob takes it."""
        factors = {}
        if self.hparams.head_lr_factor != 1.0:
            factors = {f"{name}.*": self.hparams.head_lr_factor for name in classifier_names(self.net)}
        given = self.hparams.lr_factors or {}
        return factors | {glob.removeprefix("net."): factor for glob, factor in given.items()}

    def _logits(self, net: nn.Module, images: Tensor) -> Tensor:
        if self.hparams.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return net(images)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        function = cross_entropy if self.hparams.loss == "ce" else binary_cross_entropy
        return function(logits, targets, label_smoothing=self.hparams.label_smoothing)

    def _evaluated(self) -> dict[str, nn.Module]:
        """Networks to evaluate, by the suffix of their metrics."""
        nets = {} if self.hparams.evaluate == "ema" else {"": self.net}
        if self.averaged is not None and self.hparams.evaluate != "raw":
            nets["_ema"] = self.averaged()
        if not nets:
            raise ValueError(
                "model.evaluate is 'ema', but there are no averaged weights: add callbacks.ema, or a "
                "checkpoint of a run that had it"
            )
        return nets

    def _evaluate(self, batch: ImageBatch, stage: str) -> dict[str, Tensor]:
        for suffix, net in self._evaluated().items():
            logits = self._logits(net, batch.images)
            metrics = self.metrics[stage + suffix]
            metrics.update(logits, batch.targets, batch.valid)
            self.log_dict(metrics, batch_size=len(batch.images))
        return {"logits": logits}


_STAGES = ("val", "test")
