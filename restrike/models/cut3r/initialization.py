"""How a CUT3R starts from scratch: CroCo's start where CroCo's parts are, torch's own elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from restrike.models.cut3r.model import CUT3R

_TOKEN_STD = 0.02


def reset_parameters(model: CUT3R) -> None:
    """Xavier-uniform for image encoder, image decoder and what leads into it; small tokens; the rest is as torch does.

    The ray encoder, the state decoder and its embedding, the pose memory and the heads were added to CroCo's network
    after its initialisation, so the release leaves them to torch's defaults.
    """
    for token in (model.pose_token, model.masked_img_token, model.masked_ray_map_token):
        nn.init.normal_(token, std=_TOKEN_STD)
    projection = model.patch_embed.proj.weight
    nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
    for part in (model.enc_blocks, model.decoder_embed, model.dec_blocks):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
