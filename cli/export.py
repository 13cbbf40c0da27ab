"""`python -m cli export`: the trained network of a recipe, in a format that other tools read. Trains nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from cli.arguments import Arguments, split
from cli.doctor import build, parse
from cli.errors import UserError
from cli.run_folder import git, resolve_checkpoint
from restrike import __version__
from restrike.checkpoints import CheckpointError, load_released, safe_load
from restrike.checkpoints.hub import build_any
from restrike.checkpoints.load import select_state_dict
from restrike.export import ModelCard, save_hub_folder, save_onnx, save_program, save_safetensors
from restrike.export.files import check_target
from restrike.export.graph import example_images

FORMATS = ("safetensors", "hub", "torch-export", "onnx")
_SUFFIXES = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}
_PREPROCESSING = ("image_size", "mean", "std", "crop_pct", "crop_mode", "eval_interpolation", "interpolation")
_EPILOG = """\
formats:
  safetensors    the weights in one file, with a model card in its metadata
  hub            a folder: weights, config.json, README.md; restrike.from_pretrained(folder) reads it back
  torch-export   an ExportedProgram: graph and weights, runs with torch alone, any batch size
  onnx           the same for other runtimes (pip install 'restrike[onnx]'), checked by onnxruntime

The graphs of the last two are compared with the network before they are written. Beside these options the line takes
what `fit` takes: overrides of the recipe (model=fastervit_4) and options of its parts (--model.num_classes 10).
"""


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"export: {message}; python -m cli export --help lists the options")


def _parser() -> _Options:
    parser = _Options(
        "python -m cli export", description=__doc__, epilog=_EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", help="the recipe, or a run's saved config")
    parser.add_argument("--ckpt_path", help="a run's checkpoint or a released file; last or best of the run folder")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, type=Path, help="new file (hub: folder); nothing is overwritten")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: the EMA where the checkpoint has one")
    parser.add_argument("--licence", default="not stated", help="of the weights, for the model card")
    parser.add_argument(
        "--image_size", type=int, nargs="+", metavar="SIDE", help="of a graph: one side, or height and width"
    )
    parser.add_argument("--deploy", action="store_true", help="fold what depends on weights alone into the graph")
    return parser


@dataclass(frozen=True)
class Source:
    """A checkpoint: which weights are taken from it, and what it or its run folder knows of them."""

    file: Path
    weights: str
    metrics: dict[str, float]


def main(argv: list[str]) -> int:
    """Export one network.

    Raises:
        UserError, ValueError: one message for what the user can mend.
    """
    options, rest = _parser().parse_known_args(argv)
    if options.config is None:
        raise UserError("export needs the recipe that the weights belong to: --config conf/….yaml")
    if options.image_size is not None and len(options.image_size) > 2:
        raise UserError(f"export: --image_size takes one side, or height and width; got {options.image_size}")
    suffix = _SUFFIXES.get(options.format)
    if suffix and options.out.suffix != suffix:
        raise UserError(f"export: --out for {options.format} ends in {suffix}, got {options.out}")
    arguments = split(["fit", "--config", options.config, *rest])
    try:
        check_target(options.out)
        _export(options, arguments)
    except ValueError as error:  # of the checkpoint, the model or the format: each names what to do
        raise UserError(f"export: {error}") from error
    return 0


def _export(options: argparse.Namespace, arguments: Arguments) -> None:
    config = parse(arguments)
    source = _find_source(options, config)
    net, name, model_args = _build_network(config)
    load_released(net, source.file, use_ema=source.weights == "ema")
    _check_rebuilds(net, name, model_args)
    preprocessing = _preprocessing(config)
    card = ModelCard(
        model_name=name,
        model_args=model_args,
        weights=source.weights,
        recipe=_recipe(options.config, config.run_dir),
        licence=options.licence,
        code_version=_code_version(),
        metrics=source.metrics,
        preprocessing=preprocessing,
    )
    _write(net.eval(), options, card)
    print(f"wrote {options.out}: {name}, {source.weights} weights of {source.file}")


def _find_source(options: argparse.Namespace, config: Any) -> Source:
    """The checkpoint that the line names, looked into once."""
    given = options.ckpt_path or config.model.init_args.get("pretrained")
    if given in (None, "timm"):
        raise UserError("export needs trained weights: --ckpt_path FILE, or last or best for one of the run folder")
    if given in ("last", "best"):
        given = resolve_checkpoint(given, config.run_dir, False, "test")
    file = Path(given)
    content = safe_load(file)
    try:
        select_state_dict(content, str(file), use_ema=True)
        has_ema = True
    except CheckpointError:
        has_ema = False
    if options.weights == "ema" and not has_ema:
        raise UserError(f"{file} has no EMA weights: export --weights raw")
    weights = options.weights or ("ema" if has_ema else "raw")
    return Source(file, weights, _metrics(content, file, weights))


def _metrics(content: Any, file: Path, weights: str) -> dict[str, float]:
    """Numbers of these very weights: a published file's own, or the run's report of a test of this checkpoint."""
    if not isinstance(content, Mapping):
        return {}
    if "global_step" not in content:
        known = {"epoch": "epoch", "metric": "validation_metric"}
        return {ours: content[name] for name, ours in known.items() if isinstance(content.get(name), int | float)}
    report = file.parent.parent / "report.json"
    if not report.is_file() or report.stat().st_mtime < file.stat().st_mtime:  # trained on since it was tested
        return {}
    record = json.loads(report.read_text(encoding="utf-8"))
    if record.get("checkpoint") != file.name:
        return {}
    tested = {n: v for n, v in record.items() if n.startswith("test/") and not n.endswith("_majority_class")}
    return {n.removesuffix("_ema"): v for n, v in tested.items() if n.endswith("_ema") == (weights == "ema")}


def _build_network(config: Any) -> tuple[nn.Module, str, dict[str, Any]]:
    """The recipe's network with random weights, its name, and the arguments that build it without a recipe."""
    arguments = config.model.init_args.as_dict()
    name = arguments.get("model_name")
    module = build({"class_path": config.model.class_path, "init_args": arguments | {"pretrained": None}})
    if name is None or not isinstance(getattr(module, "net", None), nn.Module):
        raise UserError(f"{config.model.class_path} cannot be exported: it has no model_name, or no network in `net`")
    plain = dict(arguments.get("model_args") or {})
    if arguments.get("num_classes") is not None:
        plain = {"num_classes": arguments["num_classes"], **plain}
    return module.net, name, json.loads(json.dumps(plain))


def _check_rebuilds(net: nn.Module, name: str, model_args: dict[str, Any]) -> None:
    """The card must give the very network: a training module may have changed what the model's name builds."""
    with torch.device("meta"):
        again = build_any(name, **model_args).state_dict()
    ours = {key: list(value.shape) for key, value in net.state_dict().items()}
    if {key: list(value.shape) for key, value in again.items()} != ours:
        raise UserError(f"{name} with {model_args} is not the recipe's network: its training module changes it")


def _write(net: nn.Module, options: argparse.Namespace, card: ModelCard) -> None:
    if options.format == "safetensors":
        save_safetensors(net, options.out, card)
        return
    if options.format == "hub":
        save_hub_folder(net, options.out, card)
        return
    if options.deploy:
        switch: Any = getattr(net, "switch_to_deploy", None)
        if switch is None:
            raise UserError(f"--deploy: {card.model_name} has no inference form of its own")
        switch()
    images = example_images(net, _size(options.image_size or card.preprocessing.get("image_size")), options.format)
    save = save_onnx if options.format == "onnx" else save_program
    errors = save(net, options.out, card, images)
    if not errors:
        print("onnxruntime is not installed: the graph was not compared with the network")
    for output, error in errors.items():
        print(f"{output}: largest error {error:.1e} of its largest value, at two batch sizes")


def _size(given: Any) -> tuple[int, int]:
    """(H, W) from a side, or from height and width."""
    sides = [given] if isinstance(given, int) else list(given or ())
    if not sides:
        raise UserError("a graph has a fixed image size, and the recipe's data names none: --image_size SIDE")
    return sides[0], sides[-1]


def _preprocessing(config: Any) -> dict[str, Any]:
    """What the recipe's data does to an image in evaluation, as far as its options say."""
    given = config.data.init_args.as_dict()
    found = {name: given[name] for name in _PREPROCESSING if given.get(name) is not None}
    if "eval_interpolation" in found:
        found["interpolation"] = found.pop("eval_interpolation")
    if "val_shape" in given:  # a multi-view recipe: the size is that of the evaluation's batches
        shape = given["val_shape"]
        found["image_size"] = list(shape.get("init_args", shape)["size"])
    return json.loads(json.dumps(found))


def _recipe(config: str, run_dir: str) -> str:
    stem = Path(config).stem
    return Path(run_dir).name if stem.startswith("config_") else stem


def _code_version() -> str:
    commit = git("rev-parse", "--short=12", "HEAD")
    return f"{__version__} ({commit})" if commit else __version__
