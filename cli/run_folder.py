"""The run folder: what ran (config, versions, command), and which checkpoint to go on from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from cli.arguments import Arguments
from cli.compose import Composed
from cli.errors import UserError
from cli.loggers import keep_wandb_id, tell_wandb
from cli.secrets import hide_secrets
from restrike.checkpoints.atomic import newest_valid

CHECKPOINTS = "checkpoints"
_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "timm", "hydra-core", "jsonargparse", "numpy")


def saved_config(run_dir: Path, subcommand: str) -> Path:
    """Where a subcommand's resolved config lies."""
    return run_dir / f"config_{subcommand}.yaml"


def refuse_another_run(run_dir: Path, ckpt_path: str | None) -> None:
    """Raise `UserError` rather than write a new run over an earlier one."""
    if ckpt_path is None and saved_config(run_dir, "fit").exists():
        raise UserError(
            f"{run_dir} holds an earlier run: go on with it (--ckpt_path last), or give this one its own folder "
            f"(--run_dir {run_dir}-2)"
        )


def check_writable(run_dir: Path) -> None:
    """Raise `UserError` where a run could write nothing, before it has computed anything."""
    existing = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--run_dir {run_dir}: {existing} is a file, so nothing can be written there")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--run_dir {run_dir}: no permission to write in {existing}")


def resolve_checkpoint(value: str | None, run_dir: str, auto: bool, subcommand: str) -> str | None:
    """The checkpoint file that `last`, `best` or `auto` mean in the run folder: the newest that is whole.

    Raises:
        UserError: there is none, the file is missing, or it is a released file rather than a run's checkpoint.
    """
    folder = Path(run_dir) / CHECKPOINTS
    if value is None:
        found = newest_valid(folder, "last*.ckpt", report=rank_zero_warn) if auto and subcommand == "fit" else None
        return str(found) if found else None
    if value in ("last", "best"):
        found = newest_valid(folder, f"{value}*.ckpt", report=rank_zero_warn)
        if found is None:
            raise UserError(f"--ckpt_path {value}: no valid {value}*.ckpt in {folder}; run fit first, or give a file")
        return str(found)
    if "://" not in value and not Path(value).exists():
        raise UserError(f"--ckpt_path '{value}' does not exist (or say 'last' or 'best' for one of {folder})")
    if value.endswith((".pth", ".pth.tar", ".pt", ".safetensors")):
        raise UserError(f"--ckpt_path '{value}' holds weights, not a run: load it with --model.pretrained {value}")
    return value


def git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def provenance(arguments: Arguments, composed: Composed) -> dict[str, Any]:
    """Code version, package versions and the command line. No environment variables: they hold secrets."""
    from restrike import __version__

    packages = {}
    for package in _PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = git("rev-parse", "HEAD")
    return {
        "restrike": __version__,
        "commit": commit,
        "uncommitted_changes": bool(git("status", "--porcelain")) if commit else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "command": ["python", "-m", "cli", *sys.argv[1:]],
        "configs": arguments.configs,
        "overrides": arguments.overrides,
        "group_choices": composed.choices,
    }


def _relative_to_run(value: Any, run_dir: str) -> Any:
    """Put `${run_dir}` back where resolution wrote the folder's name, so that `--run_dir` moves the whole run."""
    if isinstance(value, dict):
        return {k: v if k == "run_dir" else _relative_to_run(v, run_dir) for k, v in value.items()}
    if isinstance(value, list):
        return [_relative_to_run(v, run_dir) for v in value]
    if isinstance(value, str) and (value == run_dir or value.startswith(f"{run_dir}/")):
        return "${run_dir}" + value[len(run_dir) :]
    return value


class RunFolder(SaveConfigCallback):
    """Writes the resolved config and the provenance into the run folder, on rank 0, at the start."""

    def __init__(self, parser: Any, config: Any, arguments: Arguments, composed: Composed, **kwargs: Any) -> None:
        super().__init__(parser, config, **kwargs)
        self.arguments, self.composed = arguments, composed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write once, on rank 0."""
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        folder = Path(self.config["run_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        content = yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))
        content.pop("ckpt_path", None)  # else `validate --config saved.yaml` would silently load that file
        content.pop("config", None)
        keep_wandb_id(content, folder)
        name = self.arguments.subcommand
        header = "# What ran, resolved. `python -m cli fit --config` takes this file as it stands.\n"
        if content != (content := hide_secrets(content)):
            header += "# Credentials were taken out and stand as ***: give those values again.\n"
        body = yaml.safe_dump(_relative_to_run(content, self.config["run_dir"]), sort_keys=False)
        saved_config(folder, name).write_text(header + body, encoding="utf-8")
        origin = hide_secrets(provenance(self.arguments, self.composed))
        (folder / f"provenance_{name}.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        tell_wandb(trainer.loggers, {"config": content, "provenance": origin})
