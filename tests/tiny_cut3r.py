"""A CUT3R with every part of the big one, in milliseconds, as the recorded cases build it."""

from __future__ import annotations

from typing import Any

from torch import nn

from parity_tools import fill_
from restrike.models import build

SIZES = {
    "enc_embed_dim": 128,
    "enc_depth": 3,
    "enc_num_heads": 4,
    "dec_embed_dim": 96,
    "dec_depth": 4,
    "dec_num_heads": 3,
    "state_dec_num_heads": 8,
    "state_size": 26,
    "local_mem_size": 8,
}


def tiny_cut3r(name: str = "cut3r_224_linear", **overrides: Any) -> nn.Module:
    return fill_(build(name, **{**SIZES, **overrides})).eval()
