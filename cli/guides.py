"""Spellings of a published guide, in the words of this command line: what its reader types still works, with a note."""

from __future__ import annotations

import sys
from collections.abc import Callable

from cli.errors import UserError

Tokens = list[str]

_SHAPE, _TRUE = "data.init_args.shape.init_args", ("true", "1", "yes", "on")


def translate_diffusionsfm(overrides: Tokens, recipe: str) -> tuple[Tokens, Tokens]:
    """DiffusionSfM's `key=value` overrides to ours and to options; what is ours already stays as it is.

    Each one that was translated is told of on stderr.

    Args:
        overrides: Of one command line.
        recipe: The config's name, which says whether it is the dense one.

    Raises:
        UserError: a value that has no meaning here; says what to type.
    """
    kept: Tokens = []
    options: Tokens = []
    for override in overrides:
        key, equals, value = override.partition("=")
        meaning = MEANINGS.get(key) if equals else None
        if meaning is None:
            kept.append(override)
            continue
        tokens = meaning(key, value.strip("'\""), recipe)
        kept += [token for token in tokens if not token.startswith("--")]
        options += [token for token in tokens if token.startswith("--")]
        what = " ".join(tokens) or "nothing to do: the recipe has it, or it follows from the model"
        print(f"note: {key}={value} is the guide's spelling; here: {what}", file=sys.stderr)
    return kept, options


def _is_true(value: str) -> bool:
    return value.lower() in _TRUE


def _as(target: str) -> Callable[[str, str, str], Tokens]:
    return lambda key, value, recipe: [f"{target}={value or 'null'}"]


def _nothing(key: str, value: str, recipe: str) -> Tokens:
    return []


def _category(key: str, value: str, recipe: str) -> Tokens:
    chosen = {"all_train": "seen", "all_test": "unseen"}.get(value, value)
    return [f"data.init_args.{name}.categories=[{chosen}]" for name in ("filter", "val_filter", "test_filter")]


def _views(key: str, value: str, recipe: str) -> Tokens:
    if not value.isdigit() or int(value) < 2:
        raise UserError(f"{key}={value}: a scene needs 2 views or more (the release's default of 1 crashes)")
    return [f"{_SHAPE}.views={value}", f"data.init_args.val_shape.views={value}"]


def _random_views(key: str, value: str, recipe: str) -> Tokens:
    return [f"{_SHAPE}.min_views={2 if _is_true(value) else 'null'}"]


def _dense(key: str, value: str, recipe: str) -> Tokens:
    if _is_true(value) != ("dense" in recipe):
        name = "dense" if _is_true(value) else "sparse"
        raise UserError(f"{key}={value}: that is another recipe, --config conf/diffusionsfm_{name}.yaml")
    return []


def _pretrained(key: str, value: str, recipe: str) -> Tokens:
    target = "sparse_pretrained" if "dense" in recipe else "pretrained"
    return [f"model.init_args.{target}={value or 'null'}"]


def _resume(key: str, value: str, recipe: str) -> Tokens:
    return ["--ckpt_path=last"] if _is_true(value) else []


def _clipping(key: str, value: str, recipe: str) -> Tokens:
    return [f"trainer.gradient_clip_val={1.0 if _is_true(value) else 'null'}"]


def _mixed_precision(key: str, value: str, recipe: str) -> Tokens:
    return [] if _is_true(value) else ["trainer.precision=32-true"]


def _bfloat(key: str, value: str, recipe: str) -> Tokens:
    return [] if _is_true(value) else ["trainer.precision=16-mixed"]


def _only_true(key: str, value: str, recipe: str) -> Tokens:
    if not _is_true(value):
        raise UserError(f"{key}={value}: say what rests when in callbacks.staged_freezing.init_args.stages")
    return []


def _data_set(key: str, value: str, recipe: str) -> Tokens:
    if value != "co3d":
        raise UserError(f"{key}={value}: only co3d was released; other data is packed like it (docs/co3d.md)")
    return []


def _wandb(key: str, value: str, recipe: str) -> Tokens:
    return ["logger=wandb"] if _is_true(value) else []


# The release's keys. Names of W&B's project and run are taken up where W&B is on (logger=wandb).
MEANINGS: dict[str, Callable[[str, str, str], Tokens]] = {
    "training.batch_size": _as(f"{_SHAPE}.scenes"),
    "training.max_iterations": _as("trainer.max_steps"),
    "training.lr": _as("model.init_args.lr"),
    "training.pretrain_path": _pretrained,
    "training.dpt_head": _dense,
    "training.full_num_patches_x": _nothing,
    "training.full_num_patches_y": _nothing,
    "training.gradient_clipping": _clipping,
    "training.freeze_encoder": _only_true,
    "model.freeze_transformer": _only_true,
    "training.reinit": _only_true,
    "training.mixed_precision": _mixed_precision,
    "training.bfloat": _bfloat,
    "training.resume": _resume,
    "train.resume": _resume,
    "model.num_images": _views,
    "model.random_num_images": _random_views,
    "dataset.name": _data_set,
    "dataset.category": _category,
    "dataset.shape": _category,
    "debug.wandb": _wandb,
    "debug.project_name": _nothing,
    "debug.run_name": _nothing,
    "hydra.run.dir": _as("run_dir"),
}
