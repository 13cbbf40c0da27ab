"""Settles before the start what W&B and TensorBoard would only find out in the middle of it, and what W&B may know."""

from __future__ import annotations

import importlib.util
import inspect
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from cli.arguments import Arguments
from cli.compose import PACKAGED_CONF, Composed, read_yaml

WANDB_ID = "wandb_id.txt"  # in the run folder: the W&B run that it belongs to


# logger → packages of which one is enough
_NEEDS = {"WandbLogger": ("wandb",), "TensorBoardLogger": ("tensorboard", "tensorboardX")}


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules says that it is not there
        return False


def drop_missing_loggers(arguments: Arguments, composed: Composed) -> None:
    """Take out loggers that are not installed, with their options, before anything judges those; one line says so.

    In W&B's place comes TensorBoard, where that is installed. The table goes on in any case.
    """
    loggers = composed.config.get("logger") or {}
    for name, logger in list(loggers.items()):
        kind = str((logger or {}).get("class_path", "")).rpartition(".")[2]
        if kind not in _NEEDS or any(map(is_installed, _NEEDS[kind])):
            continue
        del loggers[name]
        arguments.options[:] = _without(arguments.options, f"--logger.{name}")
        goes_on = "the table (metrics.csv) goes on alone"
        if kind == "WandbLogger" and any(map(is_installed, _NEEDS["TensorBoardLogger"])):
            content = read_yaml(PACKAGED_CONF / "logger" / "tensorboard.yaml")
            loggers.setdefault("tensorboard", content["tensorboard"])
            goes_on = "TensorBoard and the table (metrics.csv) take over"
        missing = " and ".join(_NEEDS[kind])
        rank_zero_info(f"logger.{name}: {missing} not installed (pip install {_NEEDS[kind][0]}): {goes_on}")


def _without(options: list[str], prefix: str) -> list[str]:
    """Options without `PREFIX…`, and without the values that are tokens of their own."""
    kept: list[str] = []
    tokens = iter(options)
    for token in tokens:
        name, equals, _ = token.partition("=")
        if name == prefix or name.startswith(f"{prefix}."):
            if not equals:
                next(tokens, None)
        else:
            kept.append(token)
    return kept


def settle_loggers(config: Any) -> None:
    """Put a W&B logger without a login offline, with one line, and give it its run id.

    A run folder is one W&B run: whatever goes on in the folder (a resumed fit, a test) goes on in that run, unless
    `id` says otherwise.
    """
    for name, logger in wandb_loggers(config):
        if not is_installed("wandb"):  # one that the command line alone has named
            rank_zero_info(f"logger.{name}: wandb not installed (pip install wandb): it is left out")
            config["logger"][name] = None
            continue
        arguments = logger["init_args"]  # of the logger, and of wandb.init
        if wandb_mode(logger) == "online" and not has_wandb_key():
            rank_zero_info(f"logger.{name}: no W&B login found, logging offline (`wandb login`, then `wandb sync`)")
            arguments["offline"], arguments["log_model"], arguments["mode"] = True, False, "offline"
        if not (arguments.get("id") or arguments.get("version")):
            arguments["id"] = saved_wandb_id(Path(config["run_dir"])) or uuid.uuid4().hex[:8]
        arguments["resume"] = arguments.get("resume") or "allow"  # W&B's default writes over a run with this id


def wandb_loggers(config: Any) -> Iterator[tuple[str, Any]]:
    """(name, logger) of each W&B logger of a parsed or plain config."""
    for name, logger in list((config.get("logger") or {}).items()):
        if logger is not None and str(logger.get("class_path", "")).endswith("WandbLogger"):
            yield name, logger


def wandb_mode(logger: Any) -> str:
    """What a W&B logger of a config will do: "online", "offline" or "disabled"."""
    if logger["init_args"].get("offline"):
        return "offline"
    mode = logger["init_args"].get("mode") or os.environ.get("WANDB_MODE") or "online"
    return {"dryrun": "offline", "run": "online", "shared": "online"}.get(mode, mode)


def has_wandb_key() -> bool:
    """Whether W&B finds a login in the environment or its files; nobody is asked."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # older versions


def saved_wandb_id(run_dir: Path) -> str | None:
    """The W&B run that a run folder belongs to."""
    file = run_dir / WANDB_ID
    return file.read_text(encoding="utf-8").strip() or None if file.is_file() else None


def keep_wandb_id(config: Any, run_dir: Path) -> None:
    """Note the W&B run's id in the run folder, and take it out of a plain config: another run has another."""
    for _, logger in wandb_loggers(config):
        arguments = logger["init_args"]
        run_id = arguments.get("id") or arguments.get("version")
        arguments["id"] = arguments["version"] = None
        (run_dir / WANDB_ID).write_text(f"{run_id}\n", encoding="utf-8")


def tell_wandb(loggers: list[Any], content: dict[str, Any]) -> None:
    """Put what ran into W&B's config. Its own capture of code, git and command line is off: those may hold secrets."""
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger":
            logger.log_hyperparams(content)
