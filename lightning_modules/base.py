"""What every training shares: network, start weights, memory, optimiser, schedule, clipping, raw and averaged weights.

A kind of training adds its losses and metrics: `training_step`, and evaluation steps over `evaluated()`.
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

from lightning_modules.networks import CompileScope, build_network, checkpoint_activations, compile_network
from lightning_modules.schedule_lengths import ScheduleLengths, schedule_lengths
from lightning_modules.sharding import is_sharded, shard_network
from restrike.models.layers.derived import exclude_derived_from_ddp
from restrike.optim import (
    clip_by_module,
    clip_gradients,
    create_optimizer,
    lr_scheduler,
    make_schedule,
    param_groups,
    scale_weight_decay,
    total_norm,
    weight_decay_at,
)
from restrike.optim.batch_scaling import WeightDecayRule
from restrike.optim.schedules import ScheduleName

LossTerm = Callable[[LightningModule, Any, Any], Tensor]


class TrainingModule(LightningModule):
    """Builds a network and knows how to optimise it.

    Args:
        model_name: One of Restrike's models (`faster_vit_0_224`, `vggt_1b`) or any timm model.
        model_args: More constructor arguments of the model.
        pretrained: A released weight file to start from, or "timm" to let timm download those of `model_name`.
        pretrained_ema: Take the EMA weights of that file.
        pretrained_strict: Refuse a file that lacks or adds a weight; false implies `pretrained_adapt`.
        pretrained_adapt: Leave out a head of another size (or a missing one) and fit position tables and the first
            convolution to this model; everything else must still be there.
        optimizer: timm's name: adamw, lamb, sgd, …
        lr: Peak learning rate, at the reference batch size if a callback scales it.
        lr_factors: Glob over parameter names (net.patch_embed.*) → factor on their learning rate.
        layer_decay: Factor on the learning rate per layer below the head; null for none.
        weight_decay: For tensors of two or more dimensions.
        weight_decay_rule: "constant", or "normalized": times √(1 / optimiser steps of the run), as iFAM does.
        weight_decay_end: Weight decay follows a cosine from its start to this over the schedule; null keeps it.
        decay_all: Biases, norms and other vectors decay too.
        betas: null keeps the optimiser's default.
        eps: null keeps the optimiser's default.
        optimizer_args: More arguments of the optimiser, such as momentum or fused.
        schedule: warmup_cosine (FasterViT's, unshifted), cosine, one_cycle, constant; progress_cosine (VGGT's, by the
            share of the run that is done) or released_progress_cosine (the same, with the count of its release).
        warmup_epochs: Length of the warm-up.
        warmup_steps: The same in optimiser steps.
        warmup_lr: Where the warm-up starts.
        min_lr: Where the schedule ends; also the rate of the cooldown.
        schedule_epochs: Length of the schedule, warm-up included; null for the whole run. What trainer.max_epochs
            goes beyond it is cooldown.
        schedule_steps: The same in optimiser steps.
        schedule_steps_per_epoch: Optimiser steps that count as one epoch of the schedule; null counts this run's.
        clip_by_module: Part of the network (beginning of its parameters' names) → L2 norm that its gradients are
            clipped to, in place of trainer.gradient_clip_val. null for none.
        evaluate: Which weights validation and test use: the raw ones, the EMA's, or both.
        channels_last: Memory layout of images and convolutions.
        grad_checkpointing: Compute activations again in the backward pass instead of keeping them: true for all,
            "selective" (VGGT) for all but the results of products: half the memory of a view.
        compile: torch.compile "none", each of the repeated "blocks", or the whole "net", in place.
        compile_args: Arguments of torch.compile.
        float32_matmul_precision: "high" allows TF32.
    """

    averaged: Callable[[], nn.Module] | None = None  # set by the EMA callback
    lr_factor: float = 1.0  # set by the LR scaling callback, before configure_optimizers

    def __init__(
        self,
        model_name: str,
        model_args: dict[str, Any] | None = None,
        pretrained: str | None = None,
        pretrained_ema: bool = False,
        pretrained_strict: bool = True,
        pretrained_adapt: bool = False,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        lr_factors: dict[str, float] | None = None,
        layer_decay: float | None = None,
        weight_decay: float = 0.05,
        weight_decay_rule: WeightDecayRule = "constant",
        weight_decay_end: float | None = None,
        decay_all: bool = False,
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
        clip_by_module: dict[str, float] | None = None,
        evaluate: Literal["raw", "ema", "both"] = "both",
        channels_last: bool = False,
        grad_checkpointing: bool | Literal["selective"] = False,
        compile: CompileScope = "none",
        compile_args: dict[str, Any] | None = None,
        float32_matmul_precision: Literal["highest", "high", "medium"] = "highest",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = build_network(model_name, download=pretrained == "timm", **(model_args or {}))
        if pretrained not in (None, "timm"):
            from restrike.checkpoints import load_released

            adapt = pretrained_adapt or not pretrained_strict
            load_released(self.net, pretrained, strict=pretrained_strict, use_ema=pretrained_ema, adapt=adapt)
        if grad_checkpointing:
            checkpoint_activations(self.net, grad_checkpointing)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        exclude_derived_from_ddp(self)
        self.loss_terms: dict[str, LossTerm] = {}  # callbacks add theirs
        self.lr_factor_globs: dict[str, float] = {}  # as lr_factors; a callback adds its own, before the fit starts
        self._lengths: ScheduleLengths | None = None

    def setup(self, stage: str) -> None:
        """Compile before the first step."""
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

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser over its parameter groups, and the schedule of its steps."""
        h = self.hparams
        extra = h.optimizer_args or {}
        if extra.get("fused") and self.trainer.precision == "16-mixed":
            raise ValueError("a fused optimizer unscales gradients itself, so they cannot be clipped under 16-mixed")
        if h.clip_by_module and self.trainer.gradient_clip_val:
            raise ValueError("model.clip_by_module and trainer.gradient_clip_val: set one of them to null")
        lengths = self._lengths = self._schedule_lengths()
        weight_decay = scale_weight_decay(h.weight_decay_rule, h.weight_decay, lengths.total_steps)
        groups = param_groups(self.net, weight_decay, self.name_lr_factors(), h.layer_decay, h.decay_all)
        optimizer = create_optimizer(h.optimizer, groups, h.lr * self.lr_factor, 0.0, h.betas, h.eps, **extra)
        schedule = make_schedule(
            h.schedule,
            lr=h.lr,
            total_steps=lengths.total_steps,
            warmup_steps=lengths.warmup_steps,
            warmup_lr=h.warmup_lr,
            min_lr=h.min_lr,
            steps_per_epoch=lengths.steps_per_epoch,
        )
        scheduler = lr_scheduler(optimizer, schedule, h.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the weight decay of this step, where it has a schedule; a function of the step alone."""
        h = self.hparams
        if h.weight_decay_end is None:
            return
        assert self._lengths is not None
        total = self._lengths.total_steps
        start = scale_weight_decay(h.weight_decay_rule, h.weight_decay, total)
        now = weight_decay_at(self.trainer.global_step + 1, start, h.weight_decay_end, total)
        for group in optimizer.param_groups:
            if group.setdefault("decays", group["weight_decay"] != 0):
                group["weight_decay"] = now
        self.log("train/weight_decay", now)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, or each module to its own norm, and log the norms before it."""
        if self.hparams.clip_by_module:
            norms = clip_by_module(self.net.named_parameters(), self.hparams.clip_by_module)
            self.log_dict({f"train/grad_norm_{part}": norm for part, norm in norms.items()})
            if norms:
                self.log("train/grad_norm", total_norm(norms.values()))
            return
        by_value = gradient_clip_algorithm == "value"
        norm = clip_gradients(self.parameters(), None if by_value else gradient_clip_val or None)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if norm is not None:
            self.log("train/grad_norm", norm)

    def name_lr_factors(self) -> dict[str, float]:
        """Factors by glob over the names of `net`; the first that matches counts."""
        given = self.lr_factor_globs | (self.hparams.lr_factors or {})
        return {glob.removeprefix("net."): factor for glob, factor in given.items()}

    def evaluated(self) -> dict[str, nn.Module]:
        """Networks to evaluate, by the suffix of their metrics: "" for the raw weights, "_ema" for the average.

        Raises:
            ValueError: only the average is wanted, and there is none.
        """
        nets = {} if self.hparams.evaluate == "ema" else {"": self.net}
        if self.averaged is not None and self.hparams.evaluate != "raw":
            nets["_ema"] = self.averaged()
        if not nets:
            raise ValueError(
                "model.evaluate is 'ema', but there are no averaged weights: add callbacks.ema, or a "
                "checkpoint of a run that had it"
            )
        return nets

    def _schedule_lengths(self) -> ScheduleLengths:
        h = self.hparams
        return schedule_lengths(
            self.trainer,
            warmup_epochs=h.warmup_epochs,
            warmup_steps=h.warmup_steps,
            schedule_epochs=h.schedule_epochs,
            schedule_steps=h.schedule_steps,
            per_epoch=h.schedule_steps_per_epoch,
        )
