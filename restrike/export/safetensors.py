"""Weights alone: one safetensors file, or a folder that says how to build the network around them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from restrike.export.card import ModelCard
from restrike.export.files import new_file, new_folder

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
_TORCH = {"format": "pt"}  # what other loaders ask for


def weights_to_save(net: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tensor once, on the CPU.

    Left out are second names of a tensor and buffers that the network computes from its settings and weights
    (`derived_buffers`: 4.9 GB of them in FasterViT-4 at 768 pixels). `load_released` needs neither.
    """
    derived = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in net.named_modules()
        for name in getattr(module, "derived_buffers", ())
    }
    seen: set[int] = set()
    weights = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        if name in derived or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        weights[name] = tensor.detach().cpu().contiguous()
    return weights


def save_safetensors(net: nn.Module, path: str | Path, card: ModelCard) -> Path:
    """Write the weights with the card as the file's metadata.

    Raises:
        ExportError: there is such a file, or it cannot be written.
    """
    path = Path(path)
    with new_file(path) as temporary:
        save_file(weights_to_save(net), temporary, metadata=card.as_metadata() | _TORCH)
    return path


def save_hub_folder(net: nn.Module, path: str | Path, card: ModelCard) -> Path:
    """Write model.safetensors, config.json and README.md, which `restrike.from_pretrained` reads back.

    Raises:
        ExportError: there is such a folder, or it cannot be written.
    """
    path = Path(path)
    with new_folder(path) as temporary:
        save_file(weights_to_save(net), temporary / WEIGHTS_NAME, metadata=_TORCH)
        config = json.dumps(card.as_config(), indent=2) + "\n"
        (temporary / CONFIG_NAME).write_text(config, encoding="utf-8")
        (temporary / "README.md").write_text(card.as_markdown(), encoding="utf-8")
    return path
