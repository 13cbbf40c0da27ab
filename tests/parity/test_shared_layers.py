"""Layers that three families share, against what DiffusionSfM's and CUT3R's releases compute with theirs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parity_tools import fill_, imagenet_image, load_case, normal, relative_error
from restrike.models.layers.block import Block
from restrike.models.layers.dinov2 import DINOV2_SIZES, DinoVisionTransformer
from restrike.models.layers.dpt import FusionDecoder, ResidualConvUnit
from restrike.models.layers.rotary import grid_positions, rotary_table, rotate_channels

TIGHT = 1e-5


@torch.no_grad()
def test_dinov2_without_registers_as_diffusionsfm_runs_it():
    _, want = load_case("diffusionsfm", "dino_features")
    width, depth, heads = DINOV2_SIZES["vits14"]
    model = DinoVisionTransformer(
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_register_tokens=0,
        antialias=False,
        interpolate_offset=0.1,
    )
    fill_(model, rename="feature_extractor.model.{}".format).eval()
    model.pos_embed.copy_(0.5 * normal("dsfm.pos_embed", 1, 1370, 384))
    images = imagenet_image("dsfm.dino", 1, 2, 3, 224, 224).flatten(0, 1)
    tokens, (block5, block11) = model.forward_features(images, taps=(5, 11))
    features = tokens[:, 1:].mT.unflatten(-1, (16, 16))[None]
    got = {"features": features, "block5": block5, "block11": block11}
    assert {name: e for name, x in got.items() if (e := relative_error(x, want[name])) > TIGHT} == {}
    assert relative_error(model(images).mT.unflatten(-1, (16, 16)), want["features"]) < TIGHT


def test_rotary_positions_below_zero_as_cut3r_uses_them():
    _, want = load_case("cut3r", "rope2d")
    tokens = normal("cut3r/b/rope", 2, 3, 7, 32)
    where = torch.tensor([[-1, -1], [0, 0], [0, 5], [3, 1], [27, 2], [14, 31], [9, 9]])
    table = rotary_table(where, 32)
    assert relative_error(rotate_channels(tokens, table), want["rope_fp32"]) < TIGHT
    assert relative_error(rotate_channels(tokens.half(), table).half(), want["rope_fp16in"]) < TIGHT
    assert relative_error(rotate_channels(tokens, rotary_table(where, 32, 10000)), want["rope_base10000"]) < TIGHT


@pytest.mark.parametrize("output", ["encoder_block_fp32rope", "raymap_block"])
def test_the_block_as_cut3r_uses_it(output):
    _, want = load_case("cut3r", "blocks")
    block = fill_(Block(64, 4, norm_eps=1e-6))
    with torch.no_grad():
        got = block(normal("cut3r/b/x", 2, 12, 64), rotary_table(grid_positions(3, 4), 16))
    assert relative_error(got, want[output]) < TIGHT


def test_a_decoder_that_doubles_crops_odd_maps_and_one_that_fits_does_not_need_to():
    maps = [normal(f"map{i}", 1, 4, *size) for i, size in enumerate([(20, 28), (10, 14), (5, 7), (3, 4)])]
    doubling, fitting = (fill_(FusionDecoder([4] * 4, 8, fit_sizes=fit, has_unused_unit=True)) for fit in (False, True))
    assert "refinenet4.resConfUnit1.conv1.weight" in doubling.state_dict()
    a, b = doubling.fuse(maps), fitting.fuse(maps)
    assert a.shape == b.shape == (1, 8, 40, 56)
    assert not torch.allclose(a, b, atol=1e-3)
    even = [normal(f"even{i}", 1, 4, 16 >> i, 24 >> i) for i in range(4)]
    assert torch.equal(doubling.fuse(even), fitting.fuse(even))


class Gated(ResidualConvUnit):
    """A unit that sees a condition, as DiffusionSfM's do."""

    def forward(self, x, condition):
        return x + condition * self.branch(x.relu())


def test_a_decoder_hands_its_condition_to_units_that_take_one():
    maps = [normal(f"even{i}", 2, 4, 16 >> i, 24 >> i) for i in range(4)]
    decoder = fill_(FusionDecoder([4] * 4, 8, unit2=Gated))
    condition = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    plain = fill_(FusionDecoder([4] * 4, 8))
    conditioned, unconditioned = decoder.fuse(maps, condition), plain.fuse(maps)
    assert torch.allclose(conditioned[1], unconditioned[1], atol=1e-5)
    assert not torch.allclose(conditioned[0], unconditioned[0], atol=1e-2)


@pytest.mark.parametrize("rectify", [False, True])
def test_the_skip_of_a_residual_unit_is_rectified_or_not(rectify):
    unit, x = ResidualConvUnit(4, rectify), normal("unit", 1, 4, 5, 5)
    nn.init.zeros_(unit.conv2.weight)
    nn.init.zeros_(unit.conv2.bias)
    assert torch.equal(unit(x), x.relu() if rectify else x)
