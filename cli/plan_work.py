"""What a config trains, built on the meta device with the modules and callbacks that `fit` would use."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._pytree import tree_leaves

from callbacks import EMA, MESA, StagedFreezing
from cli.doctor import build
from cli.draw import build_data
from cli.errors import UserError
from cli.plan_run import RunLength, RunPhase
from cli.topology import resolve_topology
from lightning_modules.networks import repeated_blocks
from restrike.data.multiview_plan import BatchShape, DynamicShape
from restrike.models.layers.derived import derived_modules
from restrike.plan.batches import meta_images, meta_views, with_values
from restrike.plan.kernels import DeviceKind
from restrike.plan.memory import Parallelism
from restrike.plan.shapes import largest_shape, mean_scenes, typical_shapes
from restrike.plan.step import StepCost, TrainingStep, trace_step

_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
_TRUE_TYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
# Shapes that stand for the mean step of a recipe whose steps differ, where it has at most so many views: a long rollout
# takes tens of seconds to follow.
_SHAPES = {24: 3, 32: 2}


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
    make: Callable[[], Any] = field(compare=False)

    def describe(self) -> str:
        """For the report."""
        height, width = self.size
        return f"{self.samples} x {self.views} views of {height} x {width}"


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
        try:
            self.data: Any = build_data(config.data.as_dict())
        except ValueError as error:
            raise UserError(f"plan: {str(error).lstrip(': ')}") from error
        self.accumulated: int = config.trainer.accumulate_grad_batches
        self.length = RunLength(config, self.data, self.layout.ranks, samples)
        self.notes += self.length.notes
        self.module = self._build_module()
        self._callbacks = [build(spec) for spec in (config.callbacks or {}).values() if _is_ours(spec)]
        self._facts = self._trainer_facts()
        self.optimizer = self._optimizer()
        self._mesa, self._freezing, self._average = (self._callback(kind) for kind in (MESA, StagedFreezing, EMA))
        self.phases = self.length.phases(self._freezing, self._mesa)
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

    def enter(self, phase: RunPhase) -> str:
        """Freeze and teach as in that phase; says what sets it apart."""
        self._facts.global_step, self._facts.current_epoch = phase.start, phase.epoch
        for callback in (self._freezing, self._mesa):
            if callback is not None:
                callback.on_train_batch_start(self._facts, self.module, None, 0)
        trained = sum(p.numel() for p in self.net.parameters() if p.requires_grad)
        teacher = ", with MESA's teacher" if "mesa" in self.module.loss_terms else ""
        return f"from step {phase.start:,}: {trained / 1e6:,.1f} M trained{teacher}"

    def shapes(self) -> list[StepShape]:
        """Micro-batches that stand for the mean step: one, or a few of a recipe whose shapes differ."""
        if not hasattr(self.data, "shape"):
            return [self.images(self.data.batch_size_per_device)]
        policy = self.data.shape
        count = next((count for views, count in _SHAPES.items() if policy.max_views <= views), 1)
        return [self._views_of(shape) for shape in typical_shapes(policy, count)]

    def samples_per_pass(self) -> float:
        """Samples of a GPU's micro-batch, in the mean."""
        data = self.data
        return mean_scenes(data.shape) if hasattr(data, "shape") else float(data.batch_size_per_device)

    def largest(self) -> StepShape:
        """The micro-batch that takes the most memory."""
        if not hasattr(self.data, "shape"):
            return self.images(self.data.batch_size_per_device)
        return self._views_of(largest_shape(self.data.shape))

    def sizes(self) -> Iterator[tuple[str, Callable[[int], StepShape], int]]:
        """Keys of the data that bound memory: name, the largest micro-batch at another value, and the recipe's own.

        A later one is for where the first at 1 is still too much.
        """
        if not hasattr(self.data, "shape"):
            yield "data.batch_size_per_device", self.images, self.data.batch_size_per_device
            return
        policy, largest = self.data.shape, self.largest()
        if isinstance(policy, DynamicShape):
            resized: Callable[[int], StepShape] = lambda images: self._views_of(  # noqa: E731
                largest_shape(replace(policy, max_img_per_gpu=images, views=min(policy.views, max(2, images))))
            )
            yield "data.shape.init_args.max_img_per_gpu", resized, policy.max_img_per_gpu
            return
        scenes = partial(self.views, largest.views, largest.size)
        yield "data.shape.init_args.scenes", scenes, largest.samples
        yield "with one scene, data.shape.init_args.views", lambda n: self.views(n, largest.size, 1), largest.views

    def curve(self, largest: StepShape) -> dict[int, StepShape]:
        """Micro-batches around the largest, by the images or the views that they have."""
        if largest.views == 1:
            own = largest.samples
            return {size: self.images(size) for size in sorted({max(2, own // 4), max(2, own // 2), own, 2 * own})}
        most = largest.views
        counts = sorted({min(2, most), max(2, most // 4), max(2, most // 2), max(2, 3 * most // 4), most})
        return {views: self.views(views, largest.size, largest.samples) for views in counts}

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

    def cost(self, shape: StepShape) -> StepCost:
        """Of one optimiser step over micro-batches of that shape, in the phase that was entered last."""
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
            return trace_step(self._step(shape, lambda batch, _: _sum(self.module(batch.images))))
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
        take, seconds = self.real_step(shape), []
        for _ in range(1 + steps):
            start = time.perf_counter()
            take()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])

    def real_step(self, shape: StepShape) -> Callable[[], None]:
        """An optimiser step on noise, of a work that is on this machine."""
        step = self._step(shape, self._training_step)
        self._facts.strategy.run_backward = lambda loss: loss.backward()
        batches = [with_values(shape.make()) for _ in range(step.micro_batches)]

        def gradients(number: int) -> None:
            dtype = step.autocast
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = self._training_step(batches[number], number)
            if number == 0:
                self.module.optimizer_zero_grad(0, 0, self.optimizer)
            (loss / step.micro_batches).backward()

        def closure() -> None:
            gradients(step.micro_batches - 1)
            self._clip()

        def take() -> None:
            for number in range(step.micro_batches - 1):
                gradients(number)
            self.module.optimizer_step(0, 0, self.optimizer, closure)
            if step.move_average is not None:
                step.move_average()

        return take

    def parallelism(self) -> Parallelism:
        """For `memory_per_gpu`."""
        if self.layout.strategy == "fsdp":
            return Parallelism.fsdp(self.layout.ranks, self.net, repeated_blocks(self.net))
        if self.layout.strategy == "ddp":
            return Parallelism("ddp", self.layout.ranks, self.layout.bucket_views)
        return Parallelism()

    def _views_of(self, shape: BatchShape) -> StepShape:
        return self.views(shape.kept_views, shape.size, shape.scenes)

    def _callback(self, kind: type) -> Any:
        return next((callback for callback in self._callbacks if isinstance(callback, kind)), None)

    def _training_step(self, batch: Any, number: int) -> Tensor:
        """The module's own; `plan_step` of a module that has one takes its place."""
        step = getattr(self.module, "plan_step", None)
        if step is not None and self._device == "meta":
            return step(batch)
        result = self.module.training_step(batch, number)
        return result["loss"] if isinstance(result, dict) else result

    def _step(self, shape: StepShape, loss: Callable[[Any, int], Tensor]) -> TrainingStep:
        self.net.zero_grad()
        module, optimizer, average = self.module, self.optimizer, self._average
        step = TrainingStep(
            net=self.net,
            batch=shape.make,
            loss=loss,
            optimizer=optimizer,
            update=lambda closure: module.optimizer_step(0, 0, optimizer, closure),
            zero_grad=lambda: module.optimizer_zero_grad(0, 0, optimizer),
            clip=self._clip,
            average=average.shadow() if average else None,
            move_average=average.average.update if average and average.average else None,
            micro_batches=self.accumulated,
            autocast=_AUTOCAST.get(str(self.config.trainer.precision)),
            kind=self.kind,
        )
        self._facts.strategy.run_backward = step.backward
        return step

    def _clip(self) -> None:
        trainer = self.config.trainer
        if trainer.gradient_clip_algorithm != "value":  # which works in place
            self.module.configure_gradient_clipping(self.optimizer, trainer.gradient_clip_val, None)

    def _build_module(self) -> Any:
        arguments = self.config.model.init_args.as_dict()
        files = {name: value for name, value in arguments.items() if _is_start(name) and isinstance(value, str)}
        if files and self._device == "meta":
            given = ", ".join(f"model.{name}={value}" for name, value in files.items())
            self.notes.append(f"weights to start from are not read, as no value matters: {given}")
        arguments |= {name: None for name, value in arguments.items() if _is_start(name) and _is_given(value)}
        try:
            with torch.device(self._device):
                module: Any = build({"class_path": self.config.model.class_path, "init_args": arguments})
        except (ValueError, TypeError) as error:
            raise UserError(f"plan: {error}") from error
        if (true_type := _TRUE_TYPES.get(str(self.config.trainer.precision))) is not None:
            module.to(true_type)
        if self._device == "meta":
            module._device = torch.device("cpu")  # autocast and generators know no meta
        module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]  # nobody logs
        return module.train()

    def _optimizer(self) -> torch.optim.Optimizer:
        """The module's own, after the callbacks that decide what is trained."""
        facts = self._facts
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
        optimizer: torch.optim.Optimizer = made["optimizer"] if isinstance(made, dict) else made
        for group in optimizer.param_groups:  # on a GPU torch updates all tensors in one call, which takes memory
            if self.kind == "cuda" and "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
        facts.strategy.optimizers = facts.optimizers = [optimizer]
        return optimizer

    def _trainer_facts(self) -> Any:
        """What modules, datamodules and callbacks ask of a trainer."""
        trainer, length = self.config.trainer, self.length
        batches = length.steps_per_epoch * self.accumulated
        return SimpleNamespace(
            world_size=self.layout.ranks, global_rank=0, current_epoch=0, global_step=0, overfit_batches=0,
            accumulate_grad_batches=self.accumulated, num_training_batches=batches, fast_dev_run=False,
            estimated_stepping_batches=length.total or length.steps_per_epoch * max(1, length.epochs or 1),
            max_epochs=length.epochs, max_steps=trainer.max_steps, precision=str(trainer.precision),
            strategy=_PlannedStrategy(), gradient_clip_val=trainer.gradient_clip_val, datamodule=self.data,
            optimizers=[], loggers=[], is_global_zero=True,
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

    def _num_classes(self) -> int:
        return int(self.config.model.init_args.get("num_classes", self.data.num_classes))


class _PlannedStrategy(SingleDeviceStrategy):
    """Has the parts of a batch go backward as the plan says."""

    run_backward: Callable[[Tensor], None]

    def __init__(self) -> None:
        super().__init__("cpu")

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.run_backward(closure_loss)
        return closure_loss


def _is_start(name: str) -> bool:
    """Whether an argument of a module names weights to start from."""
    return name.startswith("pretrained") or name.endswith("pretrained")


def _is_given(value: Any) -> bool:
    return isinstance(value, (str, list))  # not the flags that say how to load them


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
