"""Models and inputs of DiffusionSfM's recorded cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity_tools import fill_, normal
from restrike import geometry as g
from restrike.models import build

SIZES = ("depth", "width", "hidden_size", "num_heads", "mlp_ratio", "max_num_images")


def recorded_model(meta: dict[str, Any]) -> nn.Module:
    """As the case built it, weights by name."""
    options = meta["constructor"]
    model = fill_(build(f"diffusionsfm_{options['model']}", **{name: options[name] for name in SIZES}))
    if "pos_embed" in meta["weights"]:
        with torch.no_grad():
            model.feature_extractor.model.pos_embed.copy_(0.5 * normal("dsfm.pos_embed", 1, 1370, 384))
    return model.eval()


def ndc(crops: Any, patches: int) -> Tensor:
    """[1, V, 2, patches, patches] of crop parameters [V, 4]."""
    return g.patch_centers(torch.as_tensor(crops, dtype=torch.float64), patches).movedim(-1, 1).float()[None]


def unit_rays(seed: str, *shape: int) -> Tensor:
    """[B, V, 8, P, P] from normal numbers [B, V, 2, 4, P, P]."""
    return F.normalize(normal(seed, *shape[:2], 2, 4, *shape[2:]), dim=3).flatten(2, 3)
