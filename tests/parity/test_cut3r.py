"""CUT3R's model against numbers recorded from the released code."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cut3r_cases import log_length
from parity_tools import PARITY_DIR, fill_, image, load_case, normal, relative_error
from restrike.checkpoints import load_released
from restrike.models import build
from restrike.models.cut3r.activations import activate_colors, activate_points, activate_pose, released_deactivate_pose
from restrike.models.cut3r.blocks import DecoderBlock, HalfRotaryAttention, ModulatedBlock
from restrike.models.cut3r.heads import DPTHead, LinearHead, Predictions, Tokens
from restrike.models.cut3r.pose_memory import PoseMemory
from restrike.models.layers.block import Block
from restrike.models.layers.rotary import grid_positions, rotary_table
from tiny_cut3r import tiny_cut3r

TIGHT = 1e-5  # what the cases' authors ask of another float32 implementation
FULL = 1e-4
HALF = 2e-4  # rounding to float16 is not monotone in rounding errors
KEYS = json.loads(gzip.decompress((PARITY_DIR / "cut3r" / "keys.json.gz").read_bytes()))
NAMES = {"linear_224": "cut3r_224_linear", "dpt_512": "cut3r_512_dpt"}
# case -> seed, views, batch, image size
TINY = {
    "model_linear_tiny": ("cut3r/vl", 4, 2, (64, 64)),
    "model_linear_tiny_rope32": ("cut3r/vl", 4, 2, (64, 64)),
    "model_linear_tiny_masks_rope32": ("cut3r/vm", 5, 2, (64, 64)),
    "model_linear_tiny_update_rope32": ("cut3r/vu", 4, 2, (64, 64)),
    "model_recurrent_rays_rope32": ("cut3r/vr", 3, 1, (64, 64)),
    "model_dpt_tiny": ("cut3r/vd", 2, 2, (48, 80)),
    "model_dpt_tiny_rope32": ("cut3r/vd", 4, 2, (48, 80)),
}


def named(predictions: Predictions) -> dict[str, Tensor]:
    """Outputs under the names of the cases."""
    got = {}
    names = "pts3d_in_self_view", "conf_self", "pts3d_in_other_view", "conf", "rgb", "camera_pose"
    for i in range(predictions.poses.shape[1]):
        view = {f"view{i}.{name}": x[:, i] for name, x in zip(names, predictions, strict=True)}
        for name, x in view.items():
            got |= {name: x}
            if "pts3d" in name or "conf" in name:
                got[f"{name}_log"] = log_length(x) if "pts3d" in name else x.log()
    return got


@torch.no_grad()
def run(
    model: Any, seed: str, views: int, batch: int, size: tuple[int, int], meta: dict[str, Any]
) -> dict[str, Tensor]:
    """A forward's outputs, and state and memory after each view."""
    images = 2 * torch.stack([image(f"{seed}/img{i}", batch, 3, *size) for i in range(views)], dim=1) - 1
    rays = torch.stack([normal(f"{seed}/ray{i}", batch, *size, 6) for i in range(views)], dim=1)
    given = meta["masks"] if isinstance(meta["masks"], dict) else {}
    masks = {name: torch.tensor(values).mT for name, values in given.items()}
    arguments = {
        "ray_maps": rays if masks else None,
        "image_mask": masks.get("img"),
        "ray_mask": masks.get("ray"),
        "reset": masks.get("reset"),
        "update": masks.get("update"),
        "masked_tokens": meta["entry"] == "forward",
    }
    got = named(model(images, **arguments))
    encoded, carry = model.encode(images, **arguments), model.start(batch)
    for i in range(views + 1):
        got |= {f"state{i}": carry.state, f"mem{i}": carry.memory}
        if i < views:
            _, carry = model.rollout(encoded.views(i, i + 1), carry)
    return got


def errors(got: dict[str, Tensor], want: dict[str, Any]) -> dict[str, float]:
    assert want.keys() <= got.keys()
    return {name: relative_error(got[name], want[name]) for name in want}


def wrong(got: dict[str, Tensor], want: dict[str, Any], tolerance: float) -> dict[str, float]:
    return {name: e for name, e in errors(got, want).items() if not e <= tolerance}


@pytest.mark.parametrize("case", TINY)
def test_tiny_models(case):
    meta, want = load_case("cut3r", case)
    is_half = not case.endswith("rope32")
    model = tiny_cut3r("cut3r_512_dpt" if "dpt" in case else "cut3r_224_linear", half_rotary=is_half)
    assert wrong(run(model, *TINY[case], meta), want, HALF if is_half else TIGHT) == {}


@pytest.mark.parametrize("name", KEYS)
def test_names_shapes_and_order_of_all_entries(name):
    with torch.device("meta"):
        model = build(NAMES[name])
    assert [[n, list(p.shape), "param"] for n, p in model.state_dict().items()] == KEYS[name]
    aliases = [n for n in model.state_dict() if n not in dict(model.named_parameters())]
    assert all(".layer_rn." in n for n in aliases)
    assert len(aliases) == (12 if name == "dpt_512" else 0)


def test_activations():
    _, want = load_case("cut3r", "activations")
    raw, pose = 2 * normal("cut3r/b/raw", 2, 4, 6, 7), normal("cut3r/b/praw", 5, 7)
    raw[0, :3, 0, 0], raw[0, 2, 0, 1], pose[1, :3] = 0, 0, 0
    pose[2] *= 1e-5
    colors = 3 * normal("cut3r/b/rgbraw", 2, 3, 6, 7)
    points, confidence = activate_points(raw)
    got = {
        "pts3d": points,
        "conf": confidence,
        "pts3d_pos_z": activate_points(raw, faces_forward=True)[0],
        "rgb": activate_colors(colors),
        "pose": activate_pose(pose),
        "pose_inverse": released_deactivate_pose(activate_pose(pose)),
    }
    assert wrong(got, want, TIGHT) == {}


@torch.no_grad()
def test_blocks():
    _, want = load_case("cut3r", "blocks")
    x, y = normal("cut3r/b/x", 2, 12, 64), normal("cut3r/b/y", 2, 11, 64)
    c, q, v = normal("cut3r/b/c", 2, 64), normal("cut3r/b/q", 2, 1, 96), normal("cut3r/b/v", 2, 1, 64)
    of_x = rotary_table(grid_positions(3, 4), 16)
    of_y = rotary_table(torch.tensor([[-1, -1], *([i // 4, i % 4] for i in range(10))]), 16)
    plain, half = (Block(64, 4, norm_eps=1e-6) for _ in range(2))
    half.attn = HalfRotaryAttention(64, 4)
    decoder, memory = fill_(DecoderBlock(64, 4)), fill_(PoseMemory(96, 64, num_slots=5, num_heads=4))
    slots = memory.mem.expand(2, -1, -1)
    got = {
        "encoder_block_fp16rope": fill_(half)(x, of_x),
        "encoder_block_fp32rope": fill_(plain)(x, of_x),
        "raymap_block": plain(x, of_x),
        "decoder_block": decoder(x, y, of_x, of_y),
        "memory_block": decoder(x, y),
        "modulated_block": fill_(ModulatedBlock(64, 4))(x, c, of_x),
        "memory_inquire": memory.read(memory.proj_q(q), slots),
        "memory_update": memory.write(memory.proj_q(q), v, slots),
    }
    assert wrong(got, want, TIGHT) == {}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "dpt"])
def test_heads(kind):
    _, want = load_case("cut3r", "heads")
    head = fill_((LinearHead if kind == "linear" else DPTHead)(96, 64, 4, 16))
    shapes = (2, 12, 96), (2, 12, 64), (2, 12, 64), (2, 13, 64)
    tokens = Tokens(*(normal(f"cut3r/b/t{i}", *shape) for i, shape in enumerate(shapes)))
    out = head(tokens, (48, 64), rotary_table(grid_positions(3, 4), 16))
    got = named(Predictions(*(x[:, None] for x in out)))
    got = {name.replace("view0", kind): x for name, x in got.items()}
    kept = {n: got[f"{n}_log" if f"{n}_log" in got else n] for n in want if n.startswith(kind)}
    assert len(kept) == 6
    assert wrong(kept, {n: want[n] for n in kept}, TIGHT) == {}


FULL_CASES = {
    "model_full_linear_224": ("cut3r_224_linear", "cut3r/fl", (224, 224), HALF),
    "model_full_linear_224_rope32": ("cut3r_224_linear", "cut3r/fl", (224, 224), FULL),
    "model_full_dpt_256x144_rope32": ("cut3r_512_dpt", "cut3r/fv", (144, 256), FULL),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL_CASES)
def test_full_models_after_a_strict_load_of_a_file_in_the_released_layout(case, tmp_path):
    meta, want = load_case("cut3r", case)
    name, seed, size, tolerance = FULL_CASES[case]
    model = fill_(build(name, half_rotary="rope32" not in case)).eval()
    file = tmp_path / "model.pth"
    torch.save({"model": {f"module.{n}": p for n, p in model.state_dict().items()}, "epoch": 1}, file)
    clear(model)
    assert load_released(model, file) == ([], [])
    assert wrong(run(model, seed, 2, 1, size, meta), want, tolerance) == {}


@torch.no_grad()
def clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.zero_()
