"""`fit validate test predict`: one composed config, checked against the signatures that it names, then run."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import torch
import yaml
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from callbacks import AtomicCheckpointIO
from cli import registry
from cli.arguments import Arguments, split
from cli.compose import Composed, compose_all
from cli.errors import EXIT_USER_ERROR, UserError, explain, explain_weights, shorten
from cli.loggers import drop_missing_loggers, settle_loggers
from cli.photos import check_photos, for_photos
from cli.run_folder import RunFolder, check_writable, refuse_another_run, resolve_checkpoint
from cli.topology import Topology, launch_traps, resolve_topology

PROJECT = Path(__file__).resolve().parent.parent
OUR_PACKAGES = ("restrike", "lightning_modules", "datamodules", "callbacks")


yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_str(str(member.value)))
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "💡 Tip" not in str(r.msg))


class Parser(LightningArgumentParser):
    """Raises `UserError` with one message where argparse would print a hundred lines and leave."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise UserError(message) from ex


class CLI(LightningCLI):
    """LightningCLI over a composed config, with named callbacks and loggers and one run folder."""

    requested = "fit"

    def __init__(self, arguments: Arguments, composed: Composed) -> None:
        CLI.requested = arguments.subcommand  # of this class, also for those that only parse
        self.arguments, self.composed = arguments, composed
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # one group over all parameters: the modules build their own
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False},
            seed_everything_default=0,
            save_config_callback=RunFolder,
            save_config_kwargs={"arguments": arguments, "composed": composed},
            args=_parser_tokens(arguments, composed),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only the requested one: each parser costs a tenth of a second."""
        return {CLI.requested: LightningCLI.subcommands()[CLI.requested]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own keys beside `model`, `data` and `trainer`."""
        _count_before_share(parser)
        parser.add_argument("--run_dir", type=str, default="runs/unnamed", help="where the run writes everything")
        parser.add_argument("--auto", type=bool, default=False, help="resume if run_dir holds a checkpoint, else start")
        parser.add_argument(
            "--cpu_threads", type=int | None, default=None, help="torch's threads; null takes all cores"
        )
        parser.add_argument("--callbacks", type=dict[str, Callback | None] | None, default=None, help="by name")
        parser.add_argument("--logger", type=dict[str, Logger | None] | None, default=None, help="by name")
        parser.add_argument("--vars", type=dict[str, Any], default={}, help="free values for interpolation")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a mistake becomes one message with the nearest right name."""
        try:
            self.config = parser.parse_args(args)
        except (UserError, OmegaConfBaseException, ValueError, TypeError, ImportError, AttributeError) as error:
            names = {*_known_names(parser, self._subcommand_parsers), *_config_names(self.composed.config)}
            tokens = [*self.arguments.options, *self.arguments.overrides]
            raise UserError(explain(str(error), names, self.composed.files, tokens)) from error

    def _parse_ckpt_path(self) -> None:
        """Not as in Lightning, which lets a checkpoint's hyper-parameters beat the command line."""

    def before_instantiate_classes(self) -> None:
        """Everything that can be wrong is said here, before anything is built."""
        config = self.config[self.arguments.subcommand]
        registry.check(config.as_dict(), self.arguments.allowed)
        check_writable(Path(config.run_dir))
        config.ckpt_path = resolve_checkpoint(
            config.get("ckpt_path"), config.run_dir, config.auto, self.arguments.subcommand
        )
        if self.arguments.subcommand == "predict":
            check_photos(config)
        settle_loggers(config)
        if config.cpu_threads is not None:
            torch.set_num_threads(config.cpu_threads)
        # The processes that Lightning's DDP launcher starts are not global rank 0 and must not judge the folder.
        if self.subcommand == "fit" and getattr(rank_zero_only, "rank", 0) == 0 and not config.trainer.fast_dev_run:
            refuse_another_run(Path(config.run_dir), config.ckpt_path)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; a value that one of them refuses is the user's to mend."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException, FileNotFoundError) as error:
            if "RESTRIKE_TRACEBACK" in os.environ:
                raise
            raise UserError(shorten(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the named callbacks and loggers, fill `devices` and `num_nodes`, and put the run into its folder."""
        config = self.config_init[self.subcommand]
        trainer = config.trainer
        trainer.callbacks = [*(trainer.callbacks or []), *filter(None, (config.callbacks or {}).values())]
        if config.logger is not None:
            trainer.logger = list(filter(None, config.logger.values())) or False
        trainer.default_root_dir = trainer.default_root_dir or config.run_dir
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins] if trainer.plugins else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            trainer.plugins = [*plugins, AtomicCheckpointIO()]
        topology = resolve_topology(trainer.devices, trainer.num_nodes, os.environ)
        trainer.devices, trainer.num_nodes = topology.devices, topology.num_nodes
        self.topology: Topology = topology
        rank_zero_info(f"run folder {config.run_dir} · {topology.describe()}")
        if getattr(rank_zero_only, "rank", 0) == 0:
            for trap in launch_traps(topology, os.environ):
                rank_zero_info(f"careful: {trap}")
        return super().instantiate_trainer(**kwargs)


def _count_before_share(parser: LightningArgumentParser) -> None:
    """`limit_train_batches: 1` is one batch, 1.0 all of them. `typing` takes Union[int, float] and Union[float, int]
    for one, in the order of whoever asked first in this process; so say it here."""
    for action in parser._actions:
        if set(get_args(getattr(action, "_typehint", None))) == {int, float, NoneType}:
            action._typehint = int | float | None  # type: ignore[attr-defined]


def _parser_tokens(arguments: Arguments, composed: Composed) -> list[str]:
    tokens = [arguments.subcommand]
    if composed.config:
        tokens += ["--config", yaml.safe_dump(composed.config, sort_keys=False)]
    return tokens + arguments.options


def _config_names(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of every key of a plain config, and of every argument of the classes that it names."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        yield f"{prefix}{key}"
        yield from _config_names(value, f"{prefix}{key}.")
    if isinstance(path := config.get("class_path"), str) and (cls := _find_class(path)) is not None:
        yield from (f"{prefix}{name}" for name in inspect.signature(cls).parameters)


def _find_class(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    if not registry.is_allowed(path):
        return None
    try:
        return getattr(__import__(module, fromlist=[name]), name, None)
    except ImportError:
        return None


def _known_names(parser: Any, subparsers: dict[str, Any]) -> Iterator[str]:
    for each in (parser, *subparsers.values()):
        yield from (action.dest for action in each._actions if action.dest)


def _exit_code(error: BaseException) -> int | None:
    """The exit code of an error whose message says all: a user's mistake, or one of our own classes. None: a defect."""
    if isinstance(error, MisconfigurationException):
        return EXIT_USER_ERROR
    is_mistake = isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | PermissionError)
    if type(error).__module__.partition(".")[0] in OUR_PACKAGES:
        return EXIT_USER_ERROR if is_mistake else 1
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename).resolve() if frames else Path()
    is_ours = raised_in.is_relative_to(PROJECT) and "site-packages" not in raised_in.parts
    # A ValueError of ours before the first batch is a check that failed; one amid training is a defect.
    is_training = any(frame.name in ("training_step", "advance") for frame in frames)
    return EXIT_USER_ERROR if is_mistake and is_ours and not is_training else None


def _change_of(arguments: Arguments) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """What the subcommand changes in a recipe."""
    if arguments.subcommand != "predict":
        return None
    has_checkpoint = any(option.partition("=")[0] == "--ckpt_path" for option in arguments.options)
    return lambda config: for_photos(config, has_checkpoint)


def run(argv: list[str]) -> int:
    """Compose, check and run one command line; returns the exit code.

    Raises:
        UserError: for whatever the user can mend.
    """
    arguments = split(argv)
    if arguments.multirun:
        from cli.sweep import sweep

        return sweep(arguments)
    registry.configure(arguments.allowed)
    composed = compose_all(arguments.configs, arguments.overrides, _change_of(arguments))
    registry.check(composed.config, arguments.allowed)
    drop_missing_loggers(arguments, composed)
    try:
        CLI(arguments, composed)
    except Exception as error:
        if isinstance(error, RuntimeError) and (mismatch := explain_weights(str(error))):
            raise UserError(mismatch) from error
        code = _exit_code(error)
        if isinstance(error, UserError) or "RESTRIKE_TRACEBACK" in os.environ or code is None:
            raise
        print(f"error: {shorten(str(error))}\n(RESTRIKE_TRACEBACK=1 shows where)", file=sys.stderr)
        return code
    return 0
