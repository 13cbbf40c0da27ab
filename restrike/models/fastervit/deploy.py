"""The inference form of a FasterViT: fewer operations, the same numbers to within rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from restrike.models.fastervit.blocks import ConvBlock, PatchEmbed
from restrike.models.fastervit.stages import AttentionStage


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Fold every BatchNorm that follows a convolution into it, and fix all positional terms.

    The last BatchNorm stays: it follows no convolution, and folded into the classifier it would leave
    `forward_features` with other features for next to no time.
    """
    for module in model.modules():
        if isinstance(module, PatchEmbed):
            layers = module.conv_down
            for conv, norm in ((0, 1), (3, 4)):
                layers[conv] = fuse_conv_bn_eval(layers[conv], layers[norm])  # type: ignore[type-var, arg-type]
                layers[norm] = nn.Identity()
        elif isinstance(module, ConvBlock):
            module.conv1 = fuse_conv_bn_eval(module.conv1, module.norm1)
            module.conv2 = fuse_conv_bn_eval(module.conv2, module.norm2)
            module.norm1 = module.norm2 = nn.Identity()  # type: ignore[assignment]
        elif isinstance(module, AttentionStage):
            module.freeze_positions()
    model.requires_grad_(False).to(memory_format=torch.channels_last)  # as the maps are: no reordering at each call
    model.register_load_state_dict_pre_hook(_refuse_loading)


def _refuse_loading(model: nn.Module, *_: Any) -> None:
    raise ValueError(
        "this model is in its inference form, whose weights are folded: build it again, load, then switch_to_deploy()"
    )
