"""`predict` with a multi-view recipe: a folder of photos in place of its data set, a scene in place of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.compose import PACKAGED_CONF, read_yaml
from cli.errors import UserError
from restrike.export.errors import ExportError
from restrike.export.files import check_target

PHOTO_DATA = "datamodules.PhotoFolderDataModule"
_FAMILIES = {
    "lightning_modules.MultiViewReconstructionModule": "vggt",
    "lightning_modules.RecurrentReconstructionModule": "cut3r",
    "lightning_modules.RayDiffusionModule": "diffusionsfm",
}
_ONE_DEVICE = {"accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto"}
_PATCH_SIZES = {"vggt": 14, "cut3r": 16}


def for_photos(config: dict[str, Any], has_checkpoint: bool) -> dict[str, Any]:
    """A recipe's config as `predict` needs it; any other config as it is.

    The network, its precision and the EMA stay. Data become the photo folder at the size of the recipe's validation,
    callbacks those that write the scene, loggers none, and the trainer one device. Files to start from are not read
    where a checkpoint follows.
    """
    family = _FAMILIES.get((config.get("model") or {}).get("class_path", ""))
    old = config.get("data") or {}
    if family is None or old.get("class_path") == PHOTO_DATA:
        return config
    model = dict(config["model"]["init_args"])
    data = read_yaml(PACKAGED_CONF / "data" / f"photo_folder_{family}.yaml")
    data["init_args"] |= {"images": "", "out": ""}  # `check_photos` asks for them
    shape = (old.get("init_args") or {}).get("val_shape") or {}
    size = shape.get("init_args", shape).get("size")  # a run's saved config names the class of the shape, too
    data["init_args"]["transform"]["init_args"] = _transform(family, size, model.get("model_args") or {})
    kept = {name: part for name, part in (config.get("callbacks") or {}).items() if name == "ema"}
    parts = [read_yaml(PACKAGED_CONF / "callbacks" / f"{name}.yaml") for name in ("write_scene", "progress")]
    if has_checkpoint:
        model |= {name: None for name in model if name.endswith("pretrained") or name == "pretrained_fresh"}
    return config | {
        "model": {**config["model"], "init_args": model},
        "data": data,
        "callbacks": {**kept, **parts[0], **parts[1]},
        "trainer": {**(config.get("trainer") or {}), **_ONE_DEVICE, "logger": False},
        "logger": None,
        "return_predictions": False,  # they are on the disk
    }


def _transform(family: str, size: Sequence[int] | None, model_args: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the family's transform: the recipe's size, the network's patches."""
    patch = {"patch_size": model_args.get("patch_size", _PATCH_SIZES[family])} if family in _PATCH_SIZES else {}
    if not (isinstance(size, list | tuple) and all(isinstance(side, int) for side in size)):
        return patch
    square = {"is_square": size[0] == size[1]} if family == "cut3r" else {}
    return {"size": max(size), **square, **patch}


def check_photos(config: Any) -> None:
    """Say what is wrong with the photos, the new folder and the weights before a network is built.

    Args:
        config: The parsed config of the subcommand.

    Raises:
        UserError: no trained weights, no such photos, or a folder that is there already or cannot be written.
    """
    if getattr(config.data, "class_path", "") != PHOTO_DATA:
        return
    from restrike.data.photos import list_photos

    args = config.data.init_args
    if not (args.images and args.out):
        raise UserError("predict needs --data.images DIR (of photos) and --data.out DIR (a new folder for the scene)")
    if config.get("ckpt_path") is None and not config.model.init_args.get("pretrained"):
        raise UserError(
            "predict needs trained weights: --ckpt_path FILE (of a run; last or best of its folder), or "
            "--model.pretrained FILE (released)"
        )
    try:
        list_photos(Path(args.images).expanduser())
        check_target(Path(args.out).expanduser())
    except ExportError as error:
        raise UserError(f"--data.out: {error}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
