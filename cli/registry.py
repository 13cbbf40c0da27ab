"""What a config may name: this project's classes and those of the libraries that it is built on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import set_parsing_settings

from cli.errors import UserError, did_you_mean

ALLOWED = (
    "lightning_modules",
    "datamodules",
    "callbacks",
    "restrike",
    "lightning.pytorch",
    "lightning.fabric",
    "pytorch_lightning",  # where `lightning`'s classes say that they are from, in part
    "torch.optim",
    "torch.nn",
    "torch.distributed",
    "torchmetrics",
    "timm",
)


def configure(extra: Sequence[str] = ()) -> None:
    """Let jsonargparse import nothing but `ALLOWED` and `extra` (the paths of `--allow_class_path`)."""
    set_parsing_settings(
        omegaconf_absolute_to_relative_paths=True,  # `${trainer.devices}` works inside a subcommand
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=[*ALLOWED, "typing", "collections", "builtins.dict", "builtins.list", *extra],
    )


def class_paths(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, class path) of every class that a plain config names."""
    if isinstance(config, dict):
        if isinstance(config.get("class_path"), str):
            yield key, config["class_path"]
        for name, value in config.items():
            yield from class_paths(value, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from class_paths(value, f"{key}[{index}]")


def is_allowed(path: str, extra: Sequence[str] = ()) -> bool:
    """Whether a config may name this import path (or a bare class name, which has no module to import)."""
    if "." not in path:
        return True
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in (*ALLOWED, *extra))


def check(config: dict[str, Any], extra: Sequence[str] = ()) -> None:
    """Refuse a class outside the registry before anything is imported.

    Raises:
        UserError: names the key and the opt-in.
    """
    for key, path in class_paths(config):
        if not is_allowed(path, extra):
            raise UserError(
                f"{key}.class_path '{path}' is not in the registry ({', '.join(ALLOWED)})."
                + did_you_mean(path.split(".")[0], ALLOWED)
                + f" If you trust that code, allow it with --allow_class_path {path.split('.')[0]}"
            )
