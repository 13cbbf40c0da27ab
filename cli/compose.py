"""From `--config` files and Hydra overrides to one plain config, before anything is imported that it names.

A file with a `defaults:` list is a recipe: Hydra composes it from the groups beside it. Other files (a run's saved
config, a few lines of one's own) are plain YAML. Several files are layered, the later over the earlier; value
overrides (`model.init_args.lr=0.004`) then apply to the result, so the shell beats every file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cli.errors import UserError, did_you_mean, shorten

PACKAGED_CONF = Path(__file__).resolve().parent.parent / "conf"


@dataclass
class Composed:
    """One config, and where it comes from."""

    config: dict[str, Any]
    files: list[Path] = field(default_factory=list)  # every file that may have set a key, for error messages
    choices: dict[str, str] = field(default_factory=dict)  # Hydra's group choices


def find_config(name: str) -> Path:
    """The file of that name, else that of the packaged `conf/`.

    Raises:
        UserError: there is none; names the nearest recipe.
    """
    path = Path(name)
    if path.is_file():
        return path.resolve()
    packaged = PACKAGED_CONF / Path(*path.parts[1:]) if path.parts[:1] == ("conf",) else PACKAGED_CONF / path
    if packaged.is_file():
        return packaged.resolve()
    recipes = [f"conf/{file.relative_to(PACKAGED_CONF)}" for file in PACKAGED_CONF.rglob("*.yaml")]
    raise UserError(f"config file '{name}' does not exist.{did_you_mean(name, recipes)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        UserError: the file can't be read, is no YAML, or no mapping; names file and line.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file '{path}' can't be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config file '{path}' is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config file '{path}' must hold a mapping of keys, got a {type(content).__name__}")
    return content


def conf_root(path: Path) -> Path:
    """The nearest parent called `conf` (the place of the groups), else the file's folder."""
    return next((parent for parent in path.parents if parent.name == "conf"), path.parent)


def is_recipe(path: Path) -> bool:
    """Whether Hydra has to compose the file."""
    return "defaults" in read_yaml(path)


def layer(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, deep; where `class_path` changes, the old class's `init_args` go."""
    merged = dict(base)
    if "class_path" in top and top["class_path"] != base.get("class_path"):
        merged.pop("init_args", None)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = layer(old, value) if isinstance(old, dict) and isinstance(value, dict) else copy.deepcopy(value)
    return merged


def _compose_recipe(path: Path, overrides: list[str]) -> Composed:
    root = conf_root(path)
    name = str(path.relative_to(root).with_suffix(""))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(root), version_base="1.3"):
        config = compose(name, overrides, return_hydra_config=True)
    choices = {str(group): str(choice) for group, choice in config.hydra.runtime.choices.items()}
    choices = {group: choice for group, choice in choices.items() if not group.startswith("hydra")}
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    if path.parent != root and set(plain) == {path.parent.name}:
        raise UserError(f"'{path}' lies in a subfolder of conf/: begin it with the line '# @package _global_'")
    files = [path] + [root / group / f"{choice}.yaml" for group, choice in choices.items()]
    return Composed({str(k): v for k, v in plain.items()}, [file for file in files if file.is_file()], choices)


def _apply(override: Override, config: dict[str, Any]) -> None:
    """Set, add (`+`, `++`) or delete (`~`) one value in place."""
    *parents, leaf = str(override.key_or_group).split(".")
    node: Any = config
    for depth, parent in enumerate(parents):
        if not isinstance(node, dict) or (parent not in node and not override.is_add()):
            known = [".".join([*parents[:depth], key]) for key in node] if isinstance(node, dict) else []
            raise UserError(
                f"Could not override '{override.key_or_group}': there is no '{'.'.join(parents[: depth + 1])}'."
                + did_you_mean(".".join(parents[: depth + 1]), known)
            )
        node = node.setdefault(parent, {})
    if not isinstance(node, dict):
        raise UserError(f"Could not override '{override.key_or_group}': '{'.'.join(parents)}' is not a mapping")
    adds = override.is_add() or override.is_force_add()
    # Arguments that the recipe leaves at their default are not in it: the class's signature judges those.
    if leaf not in node and not adds and (override.is_delete() or parents[-1:] not in (["init_args"], ["trainer"])):
        known = [".".join([*parents, key]) for key in node]
        raise UserError(
            f"Could not override '{override.key_or_group}': the config has no such key."
            + (did_you_mean(str(override.key_or_group), known) or " Put + before it to add one.")
        )
    if override.is_delete():
        del node[leaf]
    else:
        value = OmegaConf.to_container(OmegaConf.create({"value": override.value()}), resolve=False)
        assert isinstance(value, dict)
        old, new = node.get(leaf), value["value"]
        node[leaf] = layer(old, new) if isinstance(old, dict) and isinstance(new, dict) else new


def parse_overrides(overrides: list[str]) -> list[Override]:
    """Hydra's reading of each override.

    Raises:
        UserError: names the one that is malformed.
    """
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            raise UserError(f"override '{text}': {str(error).splitlines()[0]}") from error
    return parsed


def is_group(override: Override, root: Path) -> bool:
    """Whether an override selects from a group (a folder of `conf/`) or from Hydra's own config, not a value."""
    key = override.key_or_group
    return (root / key).is_dir() or key.startswith("hydra") or override.package is not None


def compose_all(
    configs: list[str], overrides: list[str], change: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Composed:
    """Compose every file, layer them, apply the value overrides. Interpolations stay as they are.

    Args:
        configs: Files, the later over the earlier.
        overrides: Hydra's.
        change: What a subcommand does to the layered config before the value overrides apply to it.

    Raises:
        UserError: missing or malformed file, unknown group or key.
    """
    if not configs:
        if overrides:
            raise UserError(f"'{overrides[0]}' overrides a recipe: name it with --config conf/….yaml")
        return Composed({})
    paths = [find_config(name) for name in configs]
    try:
        parsed = parse_overrides(overrides)
        recipes = [path for path in paths if is_recipe(path)]
        root = conf_root(recipes[0] if recipes else paths[0])
        groups = [o for o in parsed if is_group(o, root)]
        for override in parsed:
            if override.is_sweep_override():
                raise UserError(f"'{override.input_line}' is a sweep: add -m to run one job per value")
        if groups and not recipes:
            raise UserError(
                f"'{groups[0].input_line}' selects from a group, but {paths[0]} has no defaults: list (a saved config "
                "is already composed); start from the recipe in conf/, or override single values"
            )
        result = Composed({})
        for path in paths:
            if path in recipes:
                # Only the first recipe takes the group overrides: a second one is layered as it stands.
                chosen = [str(o.input_line) for o in groups] if path == recipes[0] else []
                part = _compose_recipe(path, chosen)
            else:
                part = Composed(read_yaml(path), [path])
            result = Composed(
                layer(result.config, part.config), [*part.files, *result.files], {**result.choices, **part.choices}
            )
        if change is not None:
            result.config = change(result.config)
        for override in parsed:
            if override not in groups:
                _apply(override, result.config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_group_hint(shorten(str(error)), overrides, conf_root(paths[0]))) from error
    return result


def _group_hint(message: str, overrides: list[str], root: Path) -> str:
    """Add the nearest group or option name to a Hydra message."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if (root / key).is_dir():
            hint = did_you_mean(value, [file.stem for file in (root / key).glob("*.yaml")])
        else:
            hint = did_you_mean(key, [folder.name for folder in root.iterdir() if folder.is_dir()])
        if hint and key in message:
            return f"{message}\n{hint.strip()}"
    return message
