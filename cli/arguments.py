"""Splits a command line into what Hydra composes and what jsonargparse parses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from cli.errors import UserError
from cli.guides import translate_diffusionsfm

SUBCOMMANDS = ("fit", "validate", "test", "predict")

_HYDRA_OVERRIDE = re.compile(r"^(\+{0,2}[\w.\-/@:$]+=.*|~[\w.\-/@:]+(=.*)?)$", re.DOTALL)
_FLAGS_WITHOUT_VALUE = ("-h", "--help", "--print_config")

# Spellings of the W&B / DDP guide that this project replaces. Those that take a value → the option it is for:
_GUIDE_OPTIONS = {
    "--wandb_project": "--logger.wandb.project",
    "--wandb_group": "--logger.wandb.group",
    "--wandb_job_type": "--logger.wandb.job_type",
    "--wandb_entity": "--logger.wandb.entity",
    "--wandb_mode": "--logger.wandb.mode",
    "--wandb_resume_id": "--logger.wandb.id",
}
# … and flags → the override that they mean.
_GUIDE_FLAGS = {"--wandb": "logger=wandb", "--freeze_backbone": "+freeze=backbone"}


@dataclass
class Arguments:
    """A command line, taken apart."""

    subcommand: str
    configs: list[str] = field(default_factory=list)  # --config files, in order
    overrides: list[str] = field(default_factory=list)  # Hydra overrides
    options: list[str] = field(default_factory=list)  # everything else, for jsonargparse
    allowed: list[str] = field(default_factory=list)  # import paths that the user trusts beside the registry
    multirun: bool = False


def _value_of(token: str, tokens: Iterator[str], example: str) -> str:
    """The value of `--name value` or `--name=value`."""
    name, equals, value = token.partition("=")
    found = value if equals else next(tokens, None)
    if not found or found.startswith("-"):
        raise UserError(f"{name} needs a value, as in {name} {example}")
    return found


def _expand_guide_aliases(argv: list[str]) -> list[str]:
    """Each of the guide's flags by what it is here; the ones about W&B also choose its logger."""
    expanded: list[str] = []
    overrides: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        name, _, value = token.partition("=")
        if name in _GUIDE_FLAGS:
            if value.lower() not in ("", "true", "false"):
                raise UserError(f"{name} is a flag: leave out '={value}'")
            overrides += [_GUIDE_FLAGS[name]] if value.lower() != "false" else []
        elif name in _GUIDE_OPTIONS:
            overrides.append(_GUIDE_FLAGS["--wandb"])
            expanded.append(f"{_GUIDE_OPTIONS[name]}={_value_of(token, tokens, 'NAME')}")
            expanded += ["--logger.wandb.resume=must"] if name == "--wandb_resume_id" else []
        else:
            expanded.append(token)
    given = [override for override in dict.fromkeys(overrides) if override not in expanded]
    return given + expanded


def split(argv: list[str]) -> Arguments:
    """Take a command line apart.

    `--config X`, `-c X`, `--allow_class_path X` and `-m` are taken out; `--name value` and `--name=value` stay; a bare
    `name=value`, `+name=value` or `~name` is a Hydra override.

    Raises:
        UserError: no or an unknown subcommand, `--config` without a file, or a bare word that is neither.
    """
    if not argv or argv[0] not in SUBCOMMANDS:
        raise UserError(f"expected one of {', '.join(SUBCOMMANDS)} first, got {argv[0] if argv else 'nothing'!r}")
    result = Arguments(argv[0])
    tokens = iter(_expand_guide_aliases(argv[1:]))
    for token in tokens:
        name = token.partition("=")[0]
        if name in ("-c", "--config"):
            result.configs.append(_value_of(token, tokens, "conf/fastervit_0.yaml"))
        elif name == "--allow_class_path":
            result.allowed.append(_value_of(token, tokens, "my_package"))
        elif token in ("-m", "--multirun"):
            result.multirun = True
        elif token.startswith("-"):
            result.options.append(token)
            takes_value = "=" not in token and token not in _FLAGS_WITHOUT_VALUE
            if takes_value and (value := next(tokens, None)) is not None:
                result.options.append(value)
        elif _HYDRA_OVERRIDE.match(token):
            result.overrides.append(token)
        else:
            raise UserError(f"'{token}' is neither an option (--model.lr 0.004) nor an override (model=fastervit_4)")
    if recipe := next((name for name in result.configs if "diffusionsfm" in name), None):
        result.overrides, options = translate_diffusionsfm(result.overrides, recipe)
        result.options += options
    return result
