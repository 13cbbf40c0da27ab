"""`-m`: Hydra runs one job per combination of values, each in a process of its own.

A job is a plain `python -m cli …` command, so no Hydra state reaches its DDP children, and any launcher that Hydra
knows (basic, submitit) can carry it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cli.arguments import Arguments
from cli.compose import conf_root, find_config, is_group, is_recipe, parse_overrides
from cli.errors import UserError, shorten

# Hydra knows only the keys that a recipe writes out; each job checks every key against its class's signature.
FREE = "++"
PROJECT = Path(__file__).resolve().parent.parent


@dataclass
class Job:
    """Picklable, for launchers that run it on another machine."""

    arguments: Arguments
    configs: list[str]  # absolute
    folder: str  # where the launcher was started

    def __call__(self, _: DictConfig) -> int:
        """Run this job's combination; raises if it fails, so that Hydra reports the job."""
        hydra = HydraConfig.get()
        overrides = [str(o).removeprefix(FREE) for o in hydra.overrides.task]
        run_dir = f"{hydra.sweep.dir}/{hydra.job.num}"
        command = [sys.executable, "-m", "cli", self.arguments.subcommand]
        command += [f"--config={file}" for file in self.configs]
        command += overrides
        if not any(o.startswith(("run_dir=", "++run_dir=")) for o in overrides) and "--run_dir" not in self._names():
            command += [f"--run_dir={run_dir}"]
        command += self.arguments.options
        environment = {**os.environ, "PYTHONPATH": f"{PROJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        subprocess.run(command, check=True, cwd=self.folder, env=environment)
        return 0

    def _names(self) -> set[str]:
        return {option.partition("=")[0] for option in self.arguments.options}


def sweep(arguments: Arguments) -> int:
    """Run every combination of the swept values; returns 0, or 1 when a job failed.

    Raises:
        UserError: no recipe is named, or Hydra refuses an override.
    """
    paths = [find_config(name) for name in arguments.configs]
    recipe = next((path for path in paths if is_recipe(path)), None)
    if recipe is None:
        raise UserError("-m needs a recipe: --config conf/….yaml")
    root = conf_root(recipe)
    job: Any = Job(arguments, [str(path) for path in paths], os.getcwd())
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(root), version_base="1.3", job_name="cli"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            name = str(recipe.relative_to(root).with_suffix(""))
            sweep_dir = f"hydra.sweep.dir=runs/sweeps/{recipe.stem}/${{now:%Y-%m-%d_%H-%M-%S}}"
            parsed = parse_overrides(arguments.overrides)
            free = [o.type is OverrideType.CHANGE and not is_group(o, root) for o in parsed]
            values = [f"{FREE if is_free else ''}{o.input_line}" for o, is_free in zip(parsed, free, strict=True)]
            results = hydra.multirun(name, job, [sweep_dir, *values], with_log_configuration=False)
        returns = [one.return_value for batch in results for one in batch]
    except subprocess.CalledProcessError as error:
        print(f"error: one job of the sweep failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(shorten(str(error))) from error
    print(f"sweep of {len(returns)} jobs done")
    return 0
