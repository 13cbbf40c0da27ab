"""The released FasterViT models, under their names, registered with timm.

Sizes: paper table 12 and the released configurations. Every constructor argument can be overridden by keyword, also
`img_size` (timm's word for `resolution`) and `model_path` (a released file to load).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from os import PathLike
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from restrike.models.fastervit.model import FasterViT

_LARGE = {"layer_scale": 1e-5, "do_propagation": True}
_SIZES: dict[str, dict[str, Any]] = {
    "0": {"dim": 64, "in_dim": 64, "depths": (2, 3, 6, 5), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.2},
    "1": {"dim": 80, "in_dim": 32, "depths": (1, 3, 8, 5), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.2},
    "2": {"dim": 96, "in_dim": 64, "depths": (3, 3, 8, 5), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.2},
    "3": {"dim": 128, "in_dim": 64, "depths": (3, 3, 12, 5), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.3},
    "4": {"dim": 196, "in_dim": 64, "depths": (3, 3, 12, 5), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.3},
    "5": {"dim": 320, "in_dim": 64, "depths": (3, 3, 12, 5), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.3},
    "6": {"dim": 320, "in_dim": 64, "depths": (3, 3, 16, 8), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5},
}
for _name in "3456":
    _SIZES[_name] |= _LARGE

# Fine-tuned from ImageNet-21K: FasterViT-4 with windows that grow with the image, and no carrier tokens.
_NO_CARRIERS = {"hat": (False, False, False, False), "drop_path_rate": 0.42}
_WINDOWS_21K = {224: (7, 7, 14, 7), 384: (7, 7, 24, 12), 512: (7, 7, 32, 16), 768: (7, 7, 48, 24)}
_CROP_21K = {224: 0.95, 384: 1.0, 512: 1.0, 768: 0.93}


def _variants() -> dict[str, dict[str, Any]]:
    """Constructor arguments by model name."""
    fixed = {f"faster_vit_{size}_224": {**args, "resolution": 224} for size, args in _SIZES.items()}
    any_res = {
        f"faster_vit_{size}_any_res": {**args, "resolution": (541 if size == "2" else 576, 960), "any_res": True}
        for size, args in _SIZES.items()
    }
    for side, windows in _WINDOWS_21K.items():
        args = _SIZES["4"] | _NO_CARRIERS | {"window_size": windows}
        fixed[f"faster_vit_4_21k_{side}"] = {**args, "resolution": side}
        any_res[f"faster_vit_4_21k_{side}_any_res"] = args | {
            "resolution": (576, 960),
            "any_res": True,
            "drop_path_rate": 0.3,
        }
    return fixed | any_res


VARIANTS = _variants()


def _cfg(name: str) -> dict[str, Any]:
    resolution = VARIANTS[name]["resolution"]
    side_21k = int(name.split("_")[4]) if "21k" in name else None
    size = name.split("_")[2]
    weights = f"4_21k_{side_21k}_w{_WINDOWS_21K[side_21k][2]}" if side_21k else f"{size}_224_1k"
    return {
        "hf_hub_id": "ahatamiz/FasterViT",
        "hf_hub_filename": f"fastervit_{weights}.pth.tar",
        "custom_load": "hf",
        "license": "other",  # NVIDIA Source Code License-NC: research and evaluation only
        "num_classes": 1000,
        "input_size": (3, resolution, resolution) if isinstance(resolution, int) else (3, *resolution),
        "pool_size": None,
        "crop_pct": _CROP_21K[side_21k] if side_21k else (0.875 if size == "0" else 1.0),
        "crop_mode": "squash" if side_21k else "center",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv_down.0",
        "classifier": "head",
        "paper_ids": "arXiv:2306.06189",
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.{'in21k_ft_in1k' if '21k' in name else 'in1k'}": _cfg(name) for name in VARIANTS}
)

_TIMM_ARGS = {
    "cache_dir", "feature_cls", "features_only", "out_indices", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_model_args",
    "pretrained_strict",
}  # fmt: skip


def create(
    name: str,
    pretrained: bool = False,
    *,
    model_path: str | PathLike[str] | None = None,
    img_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a released variant.

    Args:
        pretrained: download the released weights (non-commercial licence).
        model_path: load this released or our own checkpoint; a classifier of another size is left out.
        img_size: the same as `resolution`.
        overrides: constructor arguments of `FasterViT`, and timm's `features_only`, `out_indices` …
    """
    known = inspect.signature(FasterViT).parameters.keys()
    for key in overrides:
        if key not in known | _TIMM_ARGS:
            near = difflib.get_close_matches(key, sorted(known), n=3)
            raise ValueError(f"{name} has no argument {key!r}; nearest: {', '.join(near or sorted(known))}")
    overlay = dict(overrides.pop("pretrained_cfg_overlay", None) or {})
    if img_size is not None:
        overrides["resolution"] = img_size
    if "resolution" in overrides:
        size = overrides["resolution"]
        overlay.setdefault("input_size", (3, size, size) if isinstance(size, int) else (3, *size))
    if model_path is not None:
        pretrained = True
        overlay |= {"file": str(model_path), "custom_load": True}
    return build_model_with_cfg(
        FasterViT,
        name,
        pretrained,
        pretrained_cfg_overlay=overlay,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**VARIANTS[name], **overrides},
    )


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{name}, see `create`."
    register: Callable[..., Any] = register_model
    register(entrypoint)


for _name in VARIANTS:
    _register(_name)
