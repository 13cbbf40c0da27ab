"""What callbacks add to a training step of the quickstart.

python -m benchmarks callbacks

Lists of callbacks are taken out of a running fit and put back, step by step in a drawn order, so both kinds of step
have the same network, memory and neighbours, a few hundredths of a second apart. A block holds as many steps of each
kind, and one of each that writes the log; a row has the median and the quartiles of (with / without) over blocks. The
control is a callback without hooks: what it seems to cost is the error of the others.

What one callback costs alone is too little for that, and is the time within its own hooks.

All is processor time of the one thread in which a step runs. Batches are real digits, decoded beforehand.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from benchmarks.harness import Row, Timing, environment, pin_threads, record
from cli.compose import PACKAGED_CONF, compose_all, read_yaml
from restrike.data.samples import ImageBatch
from restrike.data_prep.embedded import prepare_digits
from restrike.data_prep.pack import PackOptions

COMMAND = "python -m benchmarks callbacks"
BLOCKS, WARMUP_BLOCKS = 8, 1
QUIET = ("rng_state", "preemption", "throughput", "step_seed", "lr_monitor", "validation_guard")  # of the quickstart
ALONE = ("ema", *QUIET, "finite_guard")
# name → (callbacks that come and go, callbacks that stay)
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "control, a callback without hooks": (("control",), ()),
    "all of the quickstart but MESA": (("ema", *QUIET), ()),
    "callbacks.mesa, a forward pass of the teacher": (("mesa",), ("ema",)),
    "all of the quickstart": (("ema", "mesa", *QUIET), ()),
}


def make(spec: dict[str, Any]) -> Any:
    """The object that a config's `class_path` and `init_args` describe."""
    module, _, name = spec["class_path"].rpartition(".")
    arguments = {
        key: make(value) if isinstance(value, dict) and "class_path" in value else value
        for key, value in spec.get("init_args", {}).items()
    }
    return getattr(importlib.import_module(module), name)(**arguments)


def quickstart(folder: Path) -> dict[str, Any]:
    """Its config with digits in `folder`, MESA on from the first step, and the guard that it leaves out."""
    config = compose_all(["conf/quickstart.yaml"], []).config
    config["callbacks"] |= read_yaml(PACKAGED_CONF / "callbacks" / "finite_guard.yaml")
    config["data"]["init_args"] |= {"data": str(folder / "digits"), "num_workers": 0}
    config["callbacks"]["control"] = {"class_path": "lightning.pytorch.Callback"}
    config["callbacks"]["mesa"]["init_args"]["start_ratio"] = -1.0
    prepare_digits(folder / "digits", PackOptions("digits", {"train": 1, "validation": 1}))
    return OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[return-value]


class Batches(LightningDataModule):
    """The same batches for ever; tells `before` that a step is about to run, and `after` how long it took."""

    num_classes = 10

    def __init__(self, batches: list[ImageBatch]) -> None:
        super().__init__()
        self.batches, self.batch_size_per_device = batches, len(batches[0].images)
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[float], None] = lambda seconds: None

    def train_dataloader(self) -> Iterator[ImageBatch]:
        for batch in itertools.cycle(self.batches):
            self.before()
            start = time.thread_time()
            yield batch
            self.after(time.thread_time() - start)


def new_trainer(config: dict[str, Any], callbacks: list[Callback], folder: Path) -> Trainer:
    """As the quickstart's, with an endless epoch and without validation."""
    return Trainer(
        **{key: config["trainer"][key] for key in ("accelerator", "devices", "log_every_n_steps")},
        gradient_clip_val=config["trainer"]["gradient_clip_val"],
        use_distributed_sampler=False,
        max_epochs=config["trainer"]["max_epochs"],
        limit_train_batches=100_000,
        default_root_dir=folder,
        limit_val_batches=0,
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),  # no default one
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Switch:
    """Takes callbacks out of a trainer and puts them back, and keeps the time of each step by kind."""

    def __init__(self, trainer: Trainer, coming: list[Callback], staying: list[Callback]) -> None:
        self.trainer, self.coming, self.staying = trainer, coming, staying
        self.size = 2 * trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it from outside
        self.draw, self.is_on, self.order = random.Random(0), True, list[bool]()
        self.seconds: dict[bool, list[list[float]]] = {True: [], False: []}  # by block

    def before(self) -> None:
        step = self.trainer.global_step
        if step % self.size == 0:
            half = self.size // 2
            order = [True] * (half - 1) + [False] * (half - 1)
            self.draw.shuffle(order)
            is_first_log_on = self.draw.random() < 0.5  # the last step of each half writes the log
            self.order = [*order[: half - 1], is_first_log_on, *order[half - 1 :], not is_first_log_on]
            for kind in self.seconds.values():
                kind.append([])
        self.is_on = self.order[step % self.size]
        trainer: Any = self.trainer  # whose list of callbacks is set from outside
        trainer.callbacks[:] = [*self.staying, *(self.coming if self.is_on else [])]
        trainer.lightning_module.loss_terms.clear()  # MESA puts its own in again

    def after(self, seconds: float) -> None:
        self.seconds[self.is_on][-1].append(seconds)
        if self.trainer.global_step >= (BLOCKS + WARMUP_BLOCKS) * self.size:
            self.trainer.should_stop = True

    def timing(self) -> Timing:
        """Mean seconds of a step in each block, with and without."""
        on, off = ([statistics.mean(b) for b in self.seconds[kind][WARMUP_BLOCKS:][:BLOCKS]] for kind in (True, False))
        return Timing(on, off)


def measure(config: dict[str, Any], names: tuple[str, ...], stay: tuple[str, ...], data: Batches, root: Path) -> Timing:
    """A fit in which the named callbacks come and go."""
    torch.manual_seed(0)
    coming, staying = ([make(config["callbacks"][name]) for name in each] for each in (names, stay))
    trainer = new_trainer(config, [*staying, *coming], root / "+".join(names))
    switch = Switch(trainer, coming, staying)
    data.before, data.after = switch.before, switch.after
    trainer.fit(make(config["model"]), datamodule=data)
    return switch.timing()


def measure_hooks(config: dict[str, Any], data: Batches, root: Path) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds in the hooks of each callback per step, window by window of the log, and of the whole step."""
    callbacks = {name: make(config["callbacks"][name]) for name in ALONE}
    spent = dict.fromkeys(callbacks, 0.0)

    def timed(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = hook(*args, **kwargs)
            spent[name] += time.thread_time() - start
            return result

        return run

    for name, callback in callbacks.items():
        for hook in (each for each in dir(Callback) if each.startswith("on_")):
            if getattr(type(callback), hook) is not getattr(Callback, hook):
                setattr(callback, hook, timed(name, getattr(callback, hook)))
    steps: list[float] = []
    windows: dict[str, list[float]] = {name: [] for name in callbacks}
    size = config["trainer"]["log_every_n_steps"]
    trainer = new_trainer(config, list(callbacks.values()), root / "hooks")

    def after(seconds: float) -> None:
        steps.append(seconds)
        if len(steps) % size == 0:
            for name in spent:
                windows[name].append(spent[name] / size)
                spent[name] = 0.0
            trainer.should_stop = len(steps) >= (BLOCKS + WARMUP_BLOCKS) * size

    data.before, data.after = lambda: None, after
    trainer.fit(make(config["model"]), datamodule=data)
    means = [statistics.mean(steps[i : i + size]) for i in range(0, len(steps) - size + 1, size)]
    return {name: each[WARMUP_BLOCKS : len(means)] for name, each in windows.items()}, means[WARMUP_BLOCKS:]


def row(name: str, timing: Timing, peer: str) -> Row:
    """What is added to a step, as percent and milliseconds: the median over blocks, and its quartiles."""
    pairs = list(zip(timing.ours_s, timing.peer_s, strict=True))
    percent = [100 * (ours / peer - 1) for ours, peer in pairs]
    added_ms = statistics.median(1e3 * (ours - peer) for ours, peer in pairs)
    low, middle, high = statistics.quantiles(percent, n=4)
    return Row(
        name=f"Step time: {name}",
        ratio=f"**{timing.ratio:.3f}×**",
        spread=f"{low:+.1f} to {high:+.1f} %",
        ours=f"{middle:+.1f} %, {added_ms:+.2f} ms per step",
        peer=f"{1e3 * statistics.median(timing.peer_s):.1f} ms ({peer})",
        command=f"`{COMMAND}`",
    )


def main() -> None:
    """Measure, and record a row for each."""
    pin_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        config = quickstart(Path(name))
        source = make(config["data"])
        source.setup("fit")
        data = Batches([source.on_after_batch_transfer(batch, 0) for batch in source.train_dataloader()])
        hooks, steps = measure_hooks(config, data, Path(name))
        for each, seconds in hooks.items():
            without = [step - hook for step, hook in zip(steps, seconds, strict=True)]
            rows.append(row(f"callbacks.{each}", Timing(steps, without), "the step without its hooks"))
        for title, (names, stay) in VARIANTS.items():
            timing = measure(config, names, stay, data, Path(name))
            rows.append(row(title, timing, f"with {', '.join(stay) or 'none'}"))
    record(*rows, where=environment("lightning", "timm"))


if __name__ == "__main__":
    main()
