"""A FasterViT with every part of the big ones, in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parity_tools import fill_
from restrike.models import build

SIDE = 128
SIZES = {
    "dim": 16,
    "in_dim": 8,
    "depths": (1, 1, 2, 2),
    "num_heads": (1, 1, 2, 4),
    "window_size": (7, 7, 4, 4),
    "resolution": SIDE,
    "num_classes": 10,
}


def tiny_fastervit(name: str = "faster_vit_3_224", **overrides: Any) -> nn.Module:
    """By default with layer scale, propagation, and 2x2 windows with carriers in stage 2; weights drawn by name."""
    model = fill_(build(name, **{**SIZES, **overrides}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("pos_emb_funct.cpb_mlp.2.weight"):
                parameter.copy_(-parameter.abs())  # else the window bias hides the carriers
    return model


def random_images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
