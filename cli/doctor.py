"""`python -m cli doctor`: what would go wrong with a run, found before a node is booked. Starts nothing."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import instantiate_class

from cli import registry
from cli.arguments import Arguments, split
from cli.compose import compose_all
from cli.draw import build_data, draw, take_options
from cli.errors import UserError
from cli.loggers import drop_missing_loggers, saved_wandb_id, settle_loggers, wandb_loggers, wandb_mode
from cli.main import CLI
from cli.run_folder import CHECKPOINTS, resolve_checkpoint, saved_config
from cli.topology import Topology, launch_traps, resolve_topology
from restrike.checkpoints.atomic import newest_valid
from restrike.data.catalogue import CATALOGUE_NAME, load_catalogue
from restrike.data.multiview_index import load_multiview_catalogue
from restrike.data_prep.co3d_verify import is_multiview_set

Level = Literal["ok", "warning", "problem"]
_SIGNS = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}
_BYTES_PER_PARAMETER = {"adamw": 8, "adam": 8, "lamb": 8, "sgd": 4}  # of optimiser state, float32
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    subject: str
    text: str


class _Parsed(CLI):
    """Parses and checks a fit line as `fit` does, and builds nothing."""

    def before_instantiate_classes(self) -> None:
        """As fit's, but an earlier run in the folder is a finding and not a refusal."""
        config = self.config.fit
        registry.check(config.as_dict(), self.arguments.allowed)
        config.ckpt_path = resolve_checkpoint(config.get("ckpt_path"), config.run_dir, config.auto, "fit")
        settle_loggers(config)

    def instantiate_classes(self) -> None:
        """Nothing is built: the doctor builds what it looks at."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def build(spec: Any) -> Any:
    """The object that a `class_path` / `init_args` mapping describes, and those inside it."""
    plain = spec.as_dict() if hasattr(spec, "as_dict") else spec
    if isinstance(plain, dict) and "class_path" in plain:
        arguments = {name: build(value) for name, value in (plain.get("init_args") or {}).items()}
        return instantiate_class((), {"class_path": plain["class_path"], "init_args": arguments})
    return plain


def _data(config: Any, topology: Topology) -> Iterator[Finding]:
    try:
        data = build_data(config.data.as_dict())
        only_evaluates = getattr(data, "only_evaluates", False)
        data.setup("test" if only_evaluates else "fit")
    except (ValueError, OSError) as error:
        yield Finding("problem", "data", str(error))
        return
    if only_evaluates:
        yield Finding("ok", "data", getattr(data, "evaluation_frames", ""))
    for split_name, scenes in getattr(data, "scene_counts", {}).items():
        yield Finding("ok", "data", f"{split_name}: {scenes:,} scenes")
    counts = getattr(data, "class_counts", {})
    for split_name, per_class in counts.items():
        yield Finding("ok", "data", f"{split_name}: {sum(per_class):,} images of {len(per_class):,} classes")
    per_device = getattr(data, "batch_size_per_device", None)
    if per_device and "train" in counts and isinstance(topology.devices, int):
        ranks = topology.devices * topology.num_nodes
        batch = per_device * ranks * config.trainer.accumulate_grad_batches
        steps = sum(counts["train"]) // (per_device * ranks) // config.trainer.accumulate_grad_batches
        level: Level = "ok" if steps else "problem"
        yield Finding(
            level, "batch", f"{ranks} ranks x {per_device}: {batch:,} images a step, {steps:,} steps an epoch"
        )


def _shards(config: Any, topology: Topology) -> Iterator[Finding]:
    arguments = config.data.get("init_args") or {}
    file = Path(str(arguments.get("data"))) / CATALOGUE_NAME
    if not file.is_file() or not isinstance(topology.devices, int):
        return
    try:
        if is_multiview_set(file.parent):
            scenes = load_multiview_catalogue(file.read_bytes(), str(file)).shards
            splits = {"train": scenes}  # which scenes are for training, the recipe's filter decides
        else:
            splits = {name: split.shards for name, split in load_catalogue(file).splits.items()}
    except ValueError as error:
        yield Finding("problem", "shards", str(error))
        return
    readers = topology.devices * topology.num_nodes * max(1, arguments.get("num_workers") or 0)
    missing = [shard.name for shards in splits.values() for shard in shards if not (file.parent / shard.name).exists()]
    if missing:
        yield Finding(
            "problem", "shards", f"{len(missing)} of the catalogue are not in {file.parent}, first {missing[0]}"
        )
    shards = len(splits.get("train", ()))
    few = " (fewer than workers: each image is still read once, several workers read from one shard)"
    yield Finding("ok", "shards", f"{shards} of training for {readers} workers{few if shards < readers else ''}")


def _cores(config: Any, topology: Topology) -> Iterator[Finding]:
    arguments = config.data.init_args if hasattr(config.data, "init_args") else {}
    workers = arguments.get("num_workers") or 0
    local = topology.devices if isinstance(topology.devices, int) else max(1, torch.cuda.device_count())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = local * (workers + 1)
    text = f"{local} processes x ({workers} workers + 1) on {cores} cores of this machine"
    yield Finding("ok" if wanted <= cores else "warning", "cores", text)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 64 * local * (workers + 1):
        yield Finding("warning", "open files", f"limit {soft}: raise it (ulimit -n 65536) for {wanted} processes")
    shared = Path("/dev/shm")  # noqa: S108 the kernel's own folder
    if workers and shared.is_dir() and (free := shutil.disk_usage(shared).free) < local * workers * GIB // 4:
        yield Finding(
            "warning", "shared memory", f"{free / GIB:.1f} GiB free in {shared}: workers hand batches over it"
        )


def _devices(config: Any, topology: Topology) -> Iterator[Finding]:
    yield Finding("ok", "processes", topology.describe())
    for trap in launch_traps(topology, os.environ):
        yield Finding("warning", "launch", trap)
    wanted = topology.devices if isinstance(topology.devices, int) else 1
    if config.trainer.accelerator in ("gpu", "cuda"):
        found = torch.cuda.device_count()
        level: Level = "ok" if found >= wanted else "problem"
        yield Finding(level, "GPUs", f"{found} here, the run asks for {wanted} per node")
    if config.trainer.precision == "bf16-mixed" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        yield Finding("problem", "precision", "bf16-mixed, but this GPU has no bfloat16: take 16-mixed")


def _model(config: Any, _: Topology) -> Iterator[Finding]:
    arguments = config.model.init_args.as_dict()
    released = arguments.get("pretrained")
    if released and released != "timm" and not Path(released).is_file():
        yield Finding("problem", "pretrained", f"{released} does not exist")
    try:
        with torch.device("meta"):
            spec = {"class_path": config.model.class_path, "init_args": arguments | {"pretrained": None}}
            parameters = sum(p.numel() for p in build(spec).parameters() if p.requires_grad)
    except (ValueError, TypeError) as error:
        yield Finding("problem", "model", str(error))
        return
    state = parameters * (4 + _BYTES_PER_PARAMETER.get(str(arguments.get("optimizer")), 8))
    averaged = parameters * 4 if (config.callbacks or {}).get("ema") else 0
    yield Finding("ok", "model", f"{parameters / 1e6:,.1f} M trained parameters")
    folder = Path(config.run_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, needed = shutil.disk_usage(existing).free, 3 * (state + averaged)  # best, last, and the one being written
    text = f"three checkpoints need about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB free in {existing}"
    yield Finding("ok" if free > needed else "problem", "disk", text)


def _run_folder(config: Any, _: Topology) -> Iterator[Finding]:
    folder = Path(config.run_dir)
    damaged: list[str] = []
    last = newest_valid(folder / CHECKPOINTS, "last*.ckpt", damaged.append)
    yield from (Finding("warning", "run folder", text) for text in damaged)
    if last is not None:
        yield Finding("ok", "run folder", f"{last} is whole: --ckpt_path last goes on from it")
    elif saved_config(folder, "fit").exists():
        yield Finding("problem", "run folder", f"{folder} holds a run without a checkpoint: give another --run_dir")
    else:
        yield Finding("ok", "run folder", f"{folder} is new")


def _loggers(config: Any, _: Topology) -> Iterator[Finding]:
    for name, logger in wandb_loggers(config):
        states = {
            "offline": "offline: `wandb sync` later",
            "disabled": "disabled",
            "online": "online, a login was found",
        }
        known = saved_wandb_id(Path(config.run_dir))
        goes_on = f"; goes on in the W&B run {known}" if known else ""
        yield Finding("ok", f"logger.{name}", states[wandb_mode(logger)] + goes_on)


CHECKS: tuple[Callable[[Any, Topology], Iterator[Finding]], ...] = (
    _devices, _data, _shards, _cores, _model, _run_folder, _loggers,
)  # fmt: skip


def parse(arguments: Arguments) -> Any:
    """The config of one fit line.

    Raises:
        UserError: the line itself is wrong, as `fit` would say.
    """
    registry.configure(arguments.allowed)
    composed = compose_all(arguments.configs, arguments.overrides)
    registry.check(composed.config, arguments.allowed)
    drop_missing_loggers(arguments, composed)
    return _Parsed(arguments, composed).config.fit


def examine(config: Any) -> list[Finding]:
    """Every finding about a config."""
    topology = resolve_topology(config.trainer.devices, config.trainer.num_nodes, os.environ)
    return [finding for check in CHECKS for finding in check(config, topology)]


def main(argv: list[str]) -> int:
    """Print the report; 1 if there is a problem."""
    if any(token in ("-h", "--help") for token in argv):
        print("usage: python -m cli doctor --config conf/….yaml [what you would give to fit] [--draw DIR]\n")
        print((__doc__ or "") + "\n\n--draw DIR [--draw_samples N]: multi-view samples as pictures and as a 3-D page")
        return 0
    drawing, argv = take_options(argv)
    arguments = split(["fit", *argv])
    if not arguments.configs:
        raise UserError("doctor needs the line that you would give to fit: --config conf/….yaml …")
    config = parse(arguments)
    findings = examine(config)
    for finding in findings:
        print(f"{_SIGNS[finding.level]}  {finding.subject}: {finding.text}")
    problems = sum(finding.level == "problem" for finding in findings)
    print(f"{problems} problem(s), {sum(f.level == 'warning' for f in findings)} warning(s)")
    if drawing is not None:
        *pictures, page = draw(config.data.as_dict(), drawing)
        print(f"{len(pictures)} pictures in {drawing.folder}; to turn and zoom: {page}")
    return 1 if problems else 0
