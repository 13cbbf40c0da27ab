"""What each callback adds to a training step of the quickstart: every variant's trainer takes one step in turn.

python -m benchmarks callbacks

Each variant fits in a thread of its own, of which one at a time runs, for one step, in a new order every round: so a
busy machine slows all alike. What is counted is the processor time of that thread, in which the whole step runs.
Batches are real digits, decoded beforehand. A time is a mean over `log_every_n_steps` steps, which holds all that is
done once in so many; the CSV log is in every variant, the peer included. The control is a callback that does nothing:
what it seems to cost is the error of the others.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from benchmarks.harness import Row, Timing, environment, pin_threads, record
from cli.compose import PACKAGED_CONF, compose_all, read_yaml
from restrike.data.samples import ImageBatch
from restrike.data_prep.embedded import prepare_digits
from restrike.data_prep.pack import PackOptions

COMMAND = "python -m benchmarks callbacks"
WINDOWS, WARMUP_WINDOWS = 16, 1
SINGLE = ("ema", "rng_state", "preemption", "throughput", "step_seed", "lr_monitor", "validation_guard", "finite_guard")
QUIET = ("rng_state", "preemption", "throughput", "step_seed", "lr_monitor", "validation_guard")  # of the quickstart
# name → (callbacks, the callbacks that it is compared with)
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "control, a callback without hooks": (("control",), ()),
    **{f"callbacks.{name}": ((name,), ()) for name in SINGLE},
    "callbacks.mesa, a forward pass of the teacher": (("ema", "mesa"), ("ema",)),
    "all of the quickstart but MESA": (("ema", *QUIET), ()),
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


class Turns(LightningDataModule):
    """The same batches for ever; before each one it waits for its turn, and notes how long the one before took."""

    num_classes = 10

    def __init__(self, batches: list[ImageBatch]) -> None:
        super().__init__()
        self.batches, self.batch_size_per_device = batches, len(batches[0].images)
        self.mine, self.others = threading.Semaphore(0), threading.Semaphore(0)
        self.step_s: list[float] = []

    def train_dataloader(self) -> Iterator[ImageBatch]:
        for batch in itertools.cycle(self.batches):
            self.others.release()
            self.mine.acquire()
            start = time.thread_time()
            yield batch
            self.step_s.append(time.thread_time() - start)


class Runner(threading.Thread):
    """A fit that takes one step whenever it is told to."""

    def __init__(self, config: dict[str, Any], names: tuple[str, ...], batches: list[ImageBatch], folder: Path) -> None:
        super().__init__(daemon=True)
        torch.manual_seed(0)
        config = copy.deepcopy(config)
        self.names, self.turns = names, Turns(batches)
        self.error: BaseException | None = None
        self.module = make(config["model"])
        callbacks = [make(config["callbacks"][name]) for name in names]
        self.trainer = Trainer(
            **{key: config["trainer"][key] for key in ("accelerator", "devices", "log_every_n_steps")},
            gradient_clip_val=config["trainer"]["gradient_clip_val"],
            use_distributed_sampler=False,
            max_epochs=config["trainer"]["max_epochs"],
            limit_train_batches=100_000,
            limit_val_batches=0,
            logger=CSVLogger(folder, "+".join(names) or "none"),
            callbacks=callbacks,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),  # no default one
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def run(self) -> None:
        torch.set_num_threads(1)  # OpenMP counts per thread
        try:
            self.trainer.fit(self.module, datamodule=self.turns)
        except BaseException as error:  # handed to the main thread
            self.error = error
        finally:
            self.turns.others.release()

    def begin(self) -> None:
        """Run up to the first step."""
        self.start()
        self._wait()

    def step(self) -> None:
        """Run one step."""
        self.turns.mine.release()
        self._wait()

    def end(self) -> None:
        """Leave the fit after one more step."""
        self.trainer.should_stop = True
        self.step()
        self.join()

    def windows(self) -> list[float]:
        """Mean seconds of a step in each window after the warm-up."""
        size: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it from outside
        means = [statistics.mean(self.turns.step_s[i : i + size]) for i in range(0, WINDOWS * size, size)]
        return means[WARMUP_WINDOWS:]

    def _wait(self) -> None:
        self.turns.others.acquire()
        if self.error is not None:
            raise self.error


def measure(config: dict[str, Any], batches: list[ImageBatch], folder: Path) -> dict[tuple[str, ...], list[float]]:
    """Seconds of a step, window by window, of every list of callbacks that occurs in `VARIANTS`."""
    lists = dict.fromkeys(names for pair in VARIANTS.values() for names in reversed(pair))
    runners = [Runner(config, names, batches, folder) for names in lists]
    for runner in runners:
        runner.begin()
    draw = random.Random(0)
    for _ in range(WINDOWS * config["trainer"]["log_every_n_steps"] + 1):
        for runner in draw.sample(runners, len(runners)):
            runner.step()
    for runner in runners:
        runner.end()
    return {runner.names: runner.windows() for runner in runners}


def row(name: str, timing: Timing, peer_names: tuple[str, ...]) -> Row:
    """What is added to a step, as percent and milliseconds: the median over windows, and its quartiles."""
    pairs = list(zip(timing.ours_s, timing.peer_s, strict=True))
    percent = [100 * (ours / peer - 1) for ours, peer in pairs]
    added_ms = statistics.median(1e3 * (ours - peer) for ours, peer in pairs)
    low, middle, high = statistics.quantiles(percent, n=4)
    return Row(
        name=f"Step time: {name}",
        ratio=f"**{timing.ratio:.3f}×**",
        spread=f"{low:+.1f} to {high:+.1f} %",
        ours=f"{middle:+.1f} %, {added_ms:+.2f} ms per step",
        peer=f"{1e3 * statistics.median(timing.peer_s):.1f} ms (with {', '.join(peer_names) or 'none'})",
        command=f"`{COMMAND}`",
    )


def main() -> None:
    """Measure all variants in turn, and record a row for each."""
    pin_threads(1)
    with tempfile.TemporaryDirectory() as name:
        config = quickstart(Path(name))
        data = make(config["data"])
        data.setup("fit")
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
        times = measure(config, batches, Path(name))
    rows = [row(title, Timing(times[names], times[peer]), peer) for title, (names, peer) in VARIANTS.items()]
    record(*rows, where=environment("lightning", "timm"))


if __name__ == "__main__":
    main()
