"""What a config trains, built on the meta device with the modules and callbacks that `fit` would use."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from callbacks import EMA, MESA, StagedFreezing
from cli.doctor import build
from cli.draw import build_data
from cli.errors import UserError
from cli.topology import resolve_topology
from lightning_modules.networks import repeated_blocks
from restrike.models.layers.derived import derived_modules
from restrike.plan.batches import meta_images, meta_views
from restrike.plan.kernels import DeviceKind
from restrike.plan.memory import Parallelism
from restrike.plan.step import StepCost, TrainingStep, trace_step

_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
_TRUE_TYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
# Training images of public sets, by number of classes: used, and said, where the data is not here.
_KNOWN_SETS = {1000: ("ImageNet-1k", 1_281_167), 21841: ("ImageNet-21k", 14_197_122), 200: ("CUB-200-2011", 5_994)}
_SHAPES_DRAWN = 5  # of a multi-view recipe whose steps differ in shape


@dataclass(frozen=True)
class Layout:
    """Processes of the run."""

    devices: int
    nodes: int
    strategy: str
    bucket_views: bool

    @property
    def ranks(self) -> int:
        return self.devices * self.nodes

    def describe(self) -> str:
        """For the report."""
        return f"{self.nodes} node(s) x {self.devices} device(s), {self.strategy}"


@dataclass(frozen=True)
class StepShape:
    """One micro-batch: how many samples and views, and how to make it."""

    samples: int
    views: int
    size: tuple[int, int]
    make: Callable[[], Any]


class Work:
    """A fit line's module, optimiser and callbacks on meta.

    Args:
        config: A parsed fit config.
        kind: Of the device whose kernels are meant.
        samples: Training samples an epoch; None asks the data.
        device: "meta", or "cpu" to measure.

    Raises:
        UserError: the model, or a value of the config, is refused.
    """

    def __init__(self, config: Any, kind: DeviceKind, samples: int | None = None, device: str = "meta") -> None:
        self.config, self.kind, self._samples, self._device = config, kind, samples, device
        self.notes: list[str] = []
        self.layout = self._find_layout()
        self.data: Any = build_data(config.data.as_dict())
        self.accumulated: int = config.trainer.accumulate_grad_batches
        self.epochs, self.batches_per_epoch = config.trainer.max_epochs, self._count_batches(samples)
        self.module = self._build_module()
        self._callbacks = [build(spec) for spec in (config.callbacks or {}).values() if _is_ours(spec)]
        self.optimizer = self._optimizer()
        self.mesa = next((callback for callback in self._callbacks if isinstance(callback, MESA)), None)
        self._average = next((callback for callback in self._callbacks if isinstance(callback, EMA)), None)
        self._runs_whole = True
        if config.model.init_args.get("compile", "none") != "none":
            self.notes.append("torch.compile is not followed: memory and time are those of eager mode")

    @property
    def net(self) -> torch.nn.Module:
        return self.module.net

    @property
    def tf32(self) -> bool:
        """Whether float32 products may use TF32."""
        return self.config.model.init_args.get("float32_matmul_precision", "highest") != "highest"

    def steps(self) -> tuple[int, int] | None:
        """Optimiser steps (without MESA's teacher, with it); None where the epoch's length is not known."""
        trainer = self.config.trainer
        if self.batches_per_epoch is None:
            return None if trainer.max_steps <= 0 else (trainer.max_steps, 0)
        per_epoch = math.ceil(self.batches_per_epoch / self.accumulated)
        epochs = self.epochs if self.epochs and self.epochs > 0 else math.inf
        if trainer.max_steps > 0:
            epochs = min(epochs, trainer.max_steps / per_epoch)
        if math.isinf(epochs):
            return None
        total = round(epochs * per_epoch)
        with_teacher = 0
        if self.mesa is not None:
            with_teacher = per_epoch * sum(self.mesa.is_active(epoch) for epoch in range(math.ceil(epochs)))
        return total - min(with_teacher, total), min(with_teacher, total)

    def shapes(self) -> list[StepShape]:
        """Micro-batches that the recipe draws: one, or a few of a recipe whose shapes differ."""
        data = self.data
        if not hasattr(data, "shape"):
            return [self.images(data.batch_size_per_device)]
        random = np.random.default_rng(0)
        drawn = {data.shape.draw(random) for _ in range(_SHAPES_DRAWN)}
        return [self.views(shape.kept_views, shape.size, shape.scenes) for shape in sorted(drawn)]

    def images(self, batch_size: int) -> StepShape:
        """A classifier's micro-batch of another size."""
        side, classes = self.data.image_size, self._num_classes()
        soft = getattr(self.data, "mixing", None) is not None
        return StepShape(batch_size, 1, (side, side), lambda: meta_images(batch_size, side, classes, soft))

    def views(self, views: int, size: tuple[int, int], scenes: int) -> StepShape:
        """A multi-view micro-batch of another size."""
        side = getattr(self.data.transform, "depth_size", None)
        depth_size = size if side is None else (side, side)
        return StepShape(scenes, views, size, lambda: meta_views(scenes, views, size, depth_size))

    def cost(self, shape: StepShape, *, with_teacher: bool = False) -> StepCost:
        """Of one optimiser step over micro-batches of that shape."""
        self.module.loss_terms.pop("mesa", None)
        if with_teacher and self.mesa is not None:
            self.module.loss_terms["mesa"] = self.mesa.term
        if self._runs_whole:
            try:
                return trace_step(self._step(shape, self._training_step))
            except (NotImplementedError, RuntimeError) as error:
                if "meta" not in str(error).lower():
                    raise
                self._runs_whole = False
                first_line = str(error).partition("\n")[0]
                self.notes.append(f"the loss looks at values ({first_line}), so the forward pass stands for it")
        try:
            return trace_step(self._step(shape, lambda batch: _sum(self.module(batch.images))))
        except TypeError as error:
            raise UserError(
                f"plan: the loss of {type(self.module).__name__} looks at values, and its forward pass takes more than "
                f"images ({error}): give it plan_step(batch) -> Tensor (docs/plan.md)"
            ) from error

    def on_this_machine(self) -> Work:
        """The same with values, to be measured."""
        return Work(self.config, self.kind, self._samples, device="cpu")

    def measure(self, shape: StepShape, steps: int = 3) -> float:
        """Median seconds of a real optimiser step on noise, after one that is not counted."""
        step = self._step(shape, self._training_step)
        dtype = step.autocast
        seconds = []
        for _ in range(1 + steps):
            batches = [tree_map(_with_values, step.batch()) for _ in range(step.micro_batches)]
            start = time.perf_counter()
            for number, batch in enumerate(batches):
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = step.loss(batch)
                if number == 0:
                    self.optimizer.zero_grad()
                (loss / step.micro_batches).backward()
            self._clip()
            self.optimizer.step()
            if step.move_average is not None:
                step.move_average()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])

    def parallelism(self) -> Parallelism:
        """For `memory_per_gpu`."""
        if self.layout.strategy == "fsdp":
            return Parallelism.fsdp(self.layout.ranks, self.net, repeated_blocks(self.net))
        if self.layout.strategy == "ddp":
            return Parallelism("ddp", self.layout.ranks, self.layout.bucket_views)
        return Parallelism()

    def _training_step(self, batch: Any) -> Tensor:
        """The module's own; `plan_step` of a module that has one takes its place."""
        step = getattr(self.module, "plan_step", None)
        if step is not None:
            return step(batch)
        result = self.module.training_step(batch, 0)
        return result["loss"] if isinstance(result, dict) else result

    def _step(self, shape: StepShape, loss: Callable[[Any], Tensor]) -> TrainingStep:
        self.net.zero_grad()
        average = self._average
        return TrainingStep(
            net=self.net,
            batch=shape.make,
            loss=loss,
            optimizer=self.optimizer,
            clip=self._clip,
            average=average.shadow() if average else None,
            move_average=average.average.update if average and average.average else None,
            micro_batches=self.accumulated,
            autocast=_AUTOCAST.get(str(self.config.trainer.precision)),
            kind=self.kind,
        )

    def _clip(self) -> None:
        trainer = self.config.trainer
        if trainer.gradient_clip_algorithm != "value":  # which works in place
            self.module.configure_gradient_clipping(self.optimizer, trainer.gradient_clip_val, None)

    def _build_module(self) -> Any:
        arguments = self.config.model.init_args.as_dict() | {"pretrained": None}
        try:
            with torch.device(self._device):
                module: Any = build({"class_path": self.config.model.class_path, "init_args": arguments})
        except (ValueError, TypeError) as error:
            raise UserError(f"plan: {error}") from error
        if (true_type := _TRUE_TYPES.get(str(self.config.trainer.precision))) is not None:
            module.to(true_type)
        module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]  # there is no trainer
        return module.train()

    def _optimizer(self) -> torch.optim.Optimizer:
        """The module's own, after the callbacks that decide what is trained."""
        facts = self._trainer_facts()
        for callback in self._callbacks:
            callback.setup(facts, self.module, "fit")
            if isinstance(callback, StagedFreezing):
                callback.on_train_start(facts, self.module)
            if isinstance(callback, EMA):
                for _, derived in derived_modules(callback.shadow()):
                    derived.reset_derived(torch.device(self._device))  # a copy on meta has lost their strides of 0
        self.module._trainer = facts  # the property's setter asks for a real one
        try:
            made = self.module.configure_optimizers()
        except ValueError as error:
            raise UserError(f"plan: {error}") from error
        finally:
            self.module._trainer = None
        optimizer: torch.optim.Optimizer = made["optimizer"] if isinstance(made, dict) else made
        for group in optimizer.param_groups:  # on a GPU torch updates all tensors in one call, which takes memory
            if self.kind == "cuda" and "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
        return optimizer

    def _trainer_facts(self) -> Any:
        """What modules, datamodules and callbacks ask of a trainer before the first step."""
        trainer = self.config.trainer
        batches = self.batches_per_epoch or 1000
        return SimpleNamespace(
            world_size=self.layout.ranks, global_rank=0, current_epoch=0, global_step=0, overfit_batches=0,
            accumulate_grad_batches=self.accumulated, num_training_batches=batches, fast_dev_run=False,
            estimated_stepping_batches=batches * (self.epochs or 1) // self.accumulated, max_epochs=self.epochs,
            max_steps=trainer.max_steps, precision=str(trainer.precision), strategy=SingleDeviceStrategy("cpu"),
            gradient_clip_val=trainer.gradient_clip_val, datamodule=self.data, optimizers=[], loggers=[],
        )  # fmt: skip

    def _find_layout(self) -> Layout:
        trainer = self.config.trainer
        topology = resolve_topology(trainer.devices, trainer.num_nodes, os.environ)
        devices = topology.devices
        if devices == "auto":
            self.notes.append("trainer.devices is auto: planned for one; give --trainer.devices")
            devices = 1
        devices = len(devices) if isinstance(devices, list) else max(1, int(devices))
        strategy, arguments = _strategy(trainer.strategy)
        if strategy == "single" and devices * topology.num_nodes > 1:
            strategy = "ddp"
        return Layout(devices, topology.num_nodes, strategy, bool(arguments.get("gradient_as_bucket_view")))

    def _count_batches(self, samples: int | None) -> int | None:
        """Batches that a rank sees in an epoch."""
        per_step = self.data.batch_size_per_device * self.layout.ranks
        if samples is None:
            batches = self._batches_of_data()
            known = _KNOWN_SETS.get(getattr(self.data, "num_classes", -1))
            if batches is None and known is not None:
                self.notes.append(f"the data is not here: {known[0]}'s {known[1]:,} training images are assumed")
                batches = known[1] // per_step
        else:
            batches = samples // per_step
        if batches is None:
            self.notes.append("the data is not here, and its size unknown: --samples N gives hours")
            return None
        limit = self.config.trainer.limit_train_batches
        if limit is None or (limit == 1.0 and isinstance(limit, float)):
            return max(1, batches)
        return max(1, int(batches * limit) if isinstance(limit, float) else min(batches, int(limit)))

    def _batches_of_data(self) -> int | None:
        ranks = self.layout.ranks
        self.data.trainer = SimpleNamespace(world_size=ranks, global_rank=0, current_epoch=0, overfit_batches=0)
        try:
            self.data.setup("fit")
            return len(self.data.train_dataloader())
        except (ValueError, OSError):
            return getattr(self.data, "steps_per_epoch", None)
        finally:
            self.data.trainer = None

    def _num_classes(self) -> int:
        return int(self.config.model.init_args.get("num_classes", self.data.num_classes))


def _is_ours(spec: Any) -> bool:
    """Of the callbacks only those that change what a step computes or keeps."""
    path = "" if spec is None else str(spec.class_path)
    return path.startswith("callbacks.") and path.rpartition(".")[2] in {"EMA", "MESA", "StagedFreezing"}


def _strategy(strategy: Any) -> tuple[str, dict[str, Any]]:
    name, arguments = strategy, dict[str, Any]()
    if hasattr(strategy, "class_path"):
        name = strategy.class_path
        given = strategy.get("init_args")
        arguments = given.as_dict() if given is not None else {}
    name = str(name).lower()
    if "modelparallel" in name or "fsdp" in name:
        return "fsdp", arguments
    return ("ddp" if "ddp" in name else "single"), arguments


def _sum(outputs: Any) -> Tensor:
    """A scalar that depends on every output that has a gradient."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([tensor.float().mean() for tensor in tensors]).sum()


def _with_values(leaf: Any) -> Any:
    """A tensor of the same shape on the CPU: noise, class 0, or true."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_floating_point():
        return torch.rand(leaf.shape, dtype=leaf.dtype, device="cpu")
    return (
        torch.ones(leaf.shape, dtype=leaf.dtype, device="cpu")
        if leaf.dtype == torch.bool
        else torch.zeros(leaf.shape, dtype=leaf.dtype, device="cpu")
    )
