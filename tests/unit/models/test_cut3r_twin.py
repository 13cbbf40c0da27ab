"""The fast model against the slow twin that is written from the paper, over options that no recorded case has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cut3r_twin import Sizes, twin_forward
from parity_tools import fill_, image, normal
from restrike.models import build

WIDTHS = {
    "enc_embed_dim": 64, "enc_depth": 2, "enc_num_heads": 4, "dec_embed_dim": 48, "dec_depth": 4, "dec_num_heads": 3,
    "state_dec_num_heads": 2, "local_mem_size": 5, "dpt_features": 8, "dpt_out_channels": (4, 8, 8, 12),
}  # fmt: skip
TIGHT = 2e-4  # points are exponentials of what rounding has touched
# name -> arguments of the model, (scenes, views), image size, which masks
CASES: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, int], tuple[str, ...]]] = {
    "linear": ({}, (2, 3), (32, 48), ()),
    "one view, one patch": ({}, (1, 1), (16, 16), ()),
    "portrait": ({"dec_depth": 2}, (1, 3), (80, 16), ()),
    "1d state": ({"state_pe": "1d", "state_size": 10}, (2, 2), (32, 32), ()),
    "even state": ({"state_size": 16}, (1, 2), (32, 32), ()),
    "odd state": ({"state_size": 30}, (1, 2), (32, 32), ()),
    "odd depth": ({"dec_depth": 5, "mlp_ratio": 2.0}, (1, 2), (32, 32), ()),
    "half rotary": ({"half_rotary": True}, (2, 2), (32, 48), ()),
    "dpt": ({"head_type": "dpt"}, (2, 2), (32, 64), ()),
    "dpt, odd grid": ({"head_type": "dpt"}, (1, 2), (48, 80), ()),
    "dpt, odd portrait": ({"head_type": "dpt", "frames_per_chunk": 1}, (2, 2), (112, 48), ()),
    "dpt, one row": ({"head_type": "dpt"}, (1, 2), (16, 48), ()),
    "masks": ({}, (3, 4), (32, 32), ("image", "ray", "reset", "update")),
    "masks, dpt": ({"head_type": "dpt"}, (2, 3), (48, 32), ("image", "ray", "reset")),
    "masks, half": ({"half_rotary": True, "state_pe": "1d"}, (2, 3), (32, 32), ("image", "ray")),
    "resets": ({}, (2, 4), (32, 32), ("reset",)),
    "updates": ({}, (2, 4), (32, 32), ("update",)),
    "rays in the stream": ({"masked_tokens": False}, (2, 3), (32, 32), ("image", "ray")),
    "ray tokens by scene": ({"masked_ray_scope": "scene"}, (4, 3), (32, 32), ("image", "ray")),
}


def masks_of(kinds: tuple[str, ...], scenes: int, views: int) -> dict[str, Tensor]:
    """Some of each, from a fixed seed; first views have their image, and the last scene has nothing but images."""
    generator, masks = torch.Generator().manual_seed(scenes + views), {}
    for kind in kinds:
        masks[kind] = torch.rand(scenes, views, generator=generator) < 0.5
    if "image" in masks:
        masks["image"][:, 0] = True
    if "ray" in masks and scenes > 1:
        masks["ray"][-1] = False
    return masks


def pair(name: str, with_gradients: bool) -> tuple[list[Tensor], list[Tensor], Any, dict[str, Tensor]]:
    """Outputs of both, the model, and the twin's weights."""
    arguments, (scenes, views), size, kinds = CASES[name]
    arguments = {**WIDTHS, "state_size": 12, **arguments}
    masked_tokens, sizes = (
        arguments.pop("masked_tokens", True),
        ("enc_num_heads", "dec_num_heads", "state_dec_num_heads"),
    )
    net = fill_(build("cut3r_224_linear", **arguments)).eval()
    weights = {n: p.detach().clone().requires_grad_(with_gradients) for n, p in net.state_dict().items()}
    images, rays = 2 * image(name, scenes, views, 3, *size) - 1, normal(name, scenes, views, *size, 6)
    masks, everywhere = masks_of(kinds, scenes, views), torch.ones(scenes, views, dtype=torch.bool)
    with torch.set_grad_enabled(with_gradients):
        ours = net(
            images, rays if "ray" in masks else None, masks.get("image"), masks.get("ray"), masks.get("reset"),
            masks.get("update"), masked_tokens,
        )  # fmt: skip
        facts = Sizes(
            *(arguments[n] for n in sizes), arguments.get("state_pe", "2d"), arguments.get("half_rotary", False)
        )
        twin = twin_forward(
            weights, facts, images, rays, masks.get("image", everywhere), masks.get("ray", ~everywhere),
            masks.get("reset", ~everywhere), masks.get("update", everywhere), masked_tokens,
            arguments.get("masked_ray_scope", "batch"),
        )  # fmt: skip
    return list(ours), [twin[n] for n in ours._fields], net, weights


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp(min=1e-12))


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_the_twins(name):
    ours, twin, *_ = pair(name, with_gradients=False)
    tolerance = 2e-3 if "half" in name else TIGHT  # rounding to float16 is not monotone in rounding errors
    logs = [(x.abs().log1p(), y.abs().log1p()) for x, y in zip(ours, twin, strict=True)]
    assert [e for x, y in logs if (e := error(x, y)) > tolerance] == []


@pytest.mark.parametrize("name", ["masks, dpt", "ray tokens by scene", "masks"])
def test_gradients_equal_the_twins(name):
    ours, twin, net, weights = pair(name, with_gradients=True)
    for outputs in (ours, twin):
        sum(x.abs().log1p().mean() for x in outputs).backward()
    for parameter_name, parameter in net.named_parameters():
        want = weights[parameter_name].grad
        assert parameter.grad is not None or "resConfUnit1" in parameter_name
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(got, torch.zeros_like(got) if want is None else want, rtol=1e-3, atol=2e-6), (
            parameter_name
        )
