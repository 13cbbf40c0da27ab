"""Settles before the start what W&B would only find out in the middle of it."""

from __future__ import annotations

import importlib.util
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn


def _has_wandb_key() -> bool:
    import wandb

    return bool(wandb.api.api_key)


def settle_loggers(config: Any) -> None:
    """Drop a W&B logger that is not installed, and put one without a login offline, each with one line."""
    for name, logger in list((config.get("logger") or {}).items()):
        if logger is None or not str(logger.get("class_path", "")).endswith("WandbLogger"):
            continue
        if importlib.util.find_spec("wandb") is None:
            rank_zero_warn(f"logger.{name}: wandb is not installed, the CSV log goes on alone")
            config["logger"][name] = None
            continue
        arguments = logger["init_args"]
        mode = (logger.get("dict_kwargs") or {}).get("mode")
        if not arguments.get("offline") and mode not in ("offline", "disabled") and not _has_wandb_key():
            rank_zero_warn(f"logger.{name}: no W&B login found, logging offline (`wandb login`, then `wandb sync`)")
            arguments["offline"] = True
