"""VGGT's model against numbers recorded from the released code."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from parity_tools import PARITY_DIR, fill_, image, load_case, normal, relative_error
from restrike.checkpoints import load_released
from restrike.models import build
from restrike.models.layers.block import Block
from restrike.models.layers.position import resample_positions
from restrike.models.layers.rotary import grid_positions, rotary_table, rotate_channels
from restrike.models.vggt.activations import activate, activate_confidence, activate_pose
from restrike.models.vggt.camera_head import CameraHead
from restrike.models.vggt.dpt_head import DPTFeatures, DPTHead, position_coordinates, position_map
from restrike.models.vggt.preprocess import load_images, load_square_images
from restrike.models.vggt.track_features import (
    correlate,
    embed_motion,
    feature_pyramid,
    position_table,
    sample_maps,
)
from tiny_vggt import scale_up_, tiny_vggt

TIGHT = 1e-5  # what the cases' authors ask of another float32 implementation
EPS = 1e-4  # inputs of tiny variance, so that rounding counts
FULL = 2e-5
PIXELS = 2e-3  # resize libraries differ
KEYS = json.loads(gzip.decompress((PARITY_DIR / "vggt" / "keys.json.gz").read_bytes()))
# case -> images, constructor arguments
MODELS = {
    "model_tiny_3v": ((1, 3, 3, 70, 98), {}),
    "model_tiny_conv_b2": ((2, 2, 3, 56, 84), {"patch_embed": "conv"}),
    "model_tiny_native_square": ((1, 2, 3, 70, 70), {}),
}


def wrong(got: dict[str, Tensor], want: dict, tolerance: float) -> dict[str, float]:
    """Errors beyond the tolerance; every recorded output has to be there."""
    assert got.keys() == want.keys()
    return {name: e for name in want if not (e := relative_error(got[name], want[name])) <= tolerance}


def positions(rows: int, columns: int) -> Tensor:
    return torch.cat([torch.zeros(5, 2, dtype=torch.long), grid_positions(rows, columns, offset=1)])


@torch.no_grad()
def run(model: nn.Module, images: Tensor, taps: dict[str, Tensor] | None = None, **arguments) -> dict[str, Tensor]:
    """A forward's outputs under the names of the cases, with the tokens of all layers."""
    tokens = model.aggregator(images)
    got = {f"tokens_{i}": x for i, x in tokens.items()}
    hook = model.aggregator.patch_embed.register_forward_hook(lambda *a: got.update(dino_patch_tokens=a[-1]))
    predictions = model(images, **arguments)
    hook.remove()
    got |= {f"pose_enc_{i}": x for i, x in enumerate(predictions.pop("pose_enc_list", []))}
    return got | predictions


@pytest.mark.parametrize("case", MODELS)
def test_tiny_models(case):
    shape, overrides = MODELS[case]
    _, want = load_case("vggt", case)
    got = run(tiny_vggt(**overrides, enable_track=False), image(case, *shape))
    assert wrong({name: got[name] for name in want}, want, TIGHT) == {}


def test_tracks_of_a_tiny_model():
    _, want = load_case("vggt", "model_tiny_track")
    model = tiny_vggt(enable_camera=False, enable_point=False, enable_depth=False)
    images = image("model_tiny_track", 1, 3, 3, 140, 154)
    queries = normal("tiny-track-q", 1, 5, 2).sigmoid() * torch.tensor([153.0, 139.0])
    maps = []
    model.track_head.feature_extractor.register_forward_hook(lambda *a: maps.append(a[-1]))
    got = run(model, images, query_points=queries)
    with torch.no_grad():
        tokens = model._patches(model.aggregator(images))
        for rounds in (1, 2):
            tracks = model.track_head(tokens, (140, 154), queries, iterations=rounds)
            got[f"vis_after_{rounds}"], got[f"conf_after_{rounds}"] = (x.sigmoid() for x in tracks[1:])
            got[f"track_{rounds - 1}"] = tracks.coords[-1]
        all_rounds = model.track_head(tokens, (140, 154), queries)
    got |= {"track_features": maps[0], "vis_final": got["vis"], "conf_final": got["conf"]}
    errors = {name: relative_error(got[name], want[name]) for name in want if name in got}
    # The tracker multiplies rounding 30 to 130 times a round, so only its first round can be compared closely.
    second, later = ("track_1", "vis_after_2", "conf_after_2"), ("vis_final", "conf_final")
    assert {n: e for n, e in errors.items() if e > TIGHT and n not in second + later} == {}
    assert max(errors[name] for name in second) < 1e-3
    assert len(all_rounds.coords) == 4
    assert relative_error(all_rounds.coords[-1], want["track_3"]) < 0.3


@pytest.mark.parametrize("case", ["block", "block_eps"])
def test_blocks(case):
    _, want = load_case("vggt", case)
    dim, scale, seed, grid, rows = (
        (96, 1.0, "blk-vis", (3, 5), 1.0) if case == "block" else (64, 0.003, "blkeps-vis", (3, 4), 0.001)
    )
    x = scale * normal(seed, 2, 5 + grid[0] * grid[1], dim)
    ours = scale_up_(fill_(Block(dim, 4, qk_norm=True, init_values=0.01)))
    dino = scale_up_(fill_(Block(dim, 4, init_values=1.0, norm_eps=1e-6)))
    table = rotary_table(positions(*grid), dim // 4)
    joined = x.flatten(0, 1)[None]
    with torch.no_grad():
        for parameter in ours.attn.qkv.parameters():
            parameter[: 2 * dim] *= rows
        got = {
            "agg_frame": ours(x, table) - x,
            "agg_global": (ours(joined, table.repeat(2)) - joined).view_as(x),
            "dino": dino(x) - x,
            "agg_attn": ours.attn(ours.norm1(x), table),
            "agg_mlp": ours.mlp(ours.norm2(x)),
            "dino_attn": dino.attn(dino.norm1(x)),
            "dino_mlp": dino.mlp(dino.norm2(x)),
        }
    assert wrong(got, want, TIGHT if case == "block" else EPS) == {}


def test_rotary_positions():
    _, want = load_case("vggt", "rope")
    where = positions(4, 6)
    turned = rotate_channels(normal("rope-vis", 2, 3, 29, 24), rotary_table(where, 24))
    assert wrong({"q_rot": turned, "positions": where.expand(2, -1, -1)}, want, TIGHT) == {}


def test_position_table_at_other_sizes():
    _, want = load_case("vggt", "pos_embed_interp")
    table = normal("pe-vis", 1, 1370, 32)
    sizes = [tuple(map(int, name[4:].split("x"))) for name in want]
    got = [resample_positions(table, (h // 14, w // 14), antialias=True) for h, w in sizes]
    assert wrong(dict(zip(want, got, strict=True)), want, TIGHT) == {}


def test_camera_head():
    _, want = load_case("vggt", "camera_head")
    head = scale_up_(fill_(CameraHead(64, depth=2, num_heads=4)))
    with torch.no_grad():
        got = head(normal("cam-vis", 2, 3, 3, 64)[:, :, 0])
    assert wrong({f"pose_enc_{i}": x for i, x in enumerate(got)}, want, TIGHT) == {}


DPT_CASES = {
    "dpt_head": ("dpt-vis", 3, (5, 7), {"features": 24, "out_channels": (16, 24, 32, 32)}),
    "dpt_head_chunked": ("dpt-visc", 9, (2, 3), {"features": 16, "out_channels": (8, 16, 24, 24)}),
}


@pytest.mark.parametrize("case", DPT_CASES)
def test_dense_heads(case):
    _, want = load_case("vggt", case)
    seed, views, grid, sizes = DPT_CASES[case]
    tokens = [normal(f"{seed}-{i}", 1, views, 5 + grid[0] * grid[1], 48)[:, :, 5:] for i in range(4)]
    size = 14 * grid[0], 14 * grid[1]
    depth, points = (fill_(DPTHead(n, kind, dim=48, **sizes)) for n, kind in ((2, "exp"), (4, "inv_log")))
    features = fill_(DPTFeatures(48, down_ratio=2, has_positions=False, **sizes))
    with torch.no_grad():
        got = dict(zip(("depth", "depth_conf"), depth(tokens, size), strict=True))
        got |= dict(zip(("points", "points_conf"), points(tokens, size), strict=True))
        got["track_features"] = features(tokens, size)
    assert wrong(got, want, TIGHT) == {}


def test_heads_and_norm_on_tokens_of_tiny_variance():
    _, want = load_case("vggt", "heads_eps")
    tokens = 0.003 * normal("heps-vis", 1, 2, 20, 64)
    camera = fill_(CameraHead(64, depth=2, num_heads=4))
    dense = fill_(DPTHead(2, "exp", features=16, dim=64, out_channels=(8, 16, 24, 24)))
    with torch.no_grad():
        got = {f"pose_enc_{i}": x for i, x in enumerate(camera(tokens[:, :, 0]))}
        got["depth"], got["depth_conf"] = dense([tokens[:, :, 5:]] * 4, (42, 70))
        got["dino_norm"] = fill_(nn.LayerNorm(64, eps=1e-6))(tokens)
    assert wrong(got, want, EPS) == {}


def test_position_maps_of_the_dense_heads():
    _, want = load_case("vggt", "dpt_pos_embed")
    got = {}
    for rows, columns, h, w, channels in ((5, 7, 70, 98, 32), (24, 37, 336, 518, 256), (37, 37, 518, 518, 64)):
        name = f"{rows}x{columns}_{h}x{w}"
        u, v = position_coordinates((rows, columns), (h, w), torch.device("cpu"))
        got[f"uv_{name}"] = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)
        got[f"emb_{name}_{channels}"] = position_map((rows, columns), (h, w), channels, u.device).permute(1, 2, 0)
    assert wrong(got, want, TIGHT) == {}


def test_activations():
    _, want = load_case("vggt", "activations")
    raw, pose = 1.5 * normal("act-vis", 2, 4, 5, 6).movedim(1, -1), normal("act-vis-p", 3, 9)
    got = {"pose": activate_pose(pose), "pose_inv_log": activate_pose(pose, "inv_log", "linear", "exp")}
    for name in want.keys() - got.keys():
        kind, confidence = name.removeprefix("conf_").rsplit("_", 1)
        is_confidence = name.startswith("conf_")
        got[name] = activate_confidence(raw[..., -1], confidence) if is_confidence else activate(raw[..., :-1], kind)
    assert wrong(got, want, TIGHT) == {}


def test_parts_of_the_tracker():
    _, want = load_case("vggt", "track_parts")
    maps, features = normal("tp-vis-f", 1, 2, 8, 12, 16), normal("tp-vis-t", 1, 2, 3, 8)
    coords = normal("tp-vis-c", 1, 2, 3, 2).sigmoid() * torch.tensor([15.0, 11.0])
    got = {
        "corr": correlate(feature_pyramid(maps, 3), features, coords, radius=2),
        "sincos": position_table(20, (6, 9), maps.device),
        "flow_emb": embed_motion(10 * coords[0], 6),
        "sampled": sample_maps(maps[:, 0], coords[:, 0]),
    }
    assert wrong(got, want, TIGHT) == {}


@pytest.mark.parametrize("name", KEYS)
def test_names_and_shapes_of_all_parameters(name):
    with torch.device("meta"):
        model = build(name)
    assert [[n, list(p.shape), "param"] for n, p in model.named_parameters()] == KEYS[name]
    assert list(model.state_dict()) == [entry[0] for entry in KEYS[name]]


@pytest.mark.slow
def test_the_full_model_after_a_strict_load_of_a_file_in_the_released_layout(tmp_path):
    _, want = load_case("vggt", "model_full_2v_56x84")
    model = scale_up_(fill_(build("vggt_1b")), gamma=1.0).eval()
    file = tmp_path / "model.pt"
    torch.save(model.state_dict(), file)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert load_released(model, file) == ([], [])
    file.unlink()
    got = run(model, image("vggt-full-vis", 1, 2, 3, 56, 84))
    assert wrong({name: got[name] for name in want}, want, FULL) == {}


def test_loading_of_image_files(tmp_path):
    _, want = load_case("vggt", "load_images")
    files = []
    for i, (height, width, has_alpha) in enumerate([(300, 400, False), (400, 300, False), (90, 257, True)]):
        channels = [image(f"ld-vis{i}", 3, height, width)]
        channels += [image(f"ld-vis{i}a", 3, height, width)[:1]] if has_alpha else []
        pixels = (255 * torch.cat(channels)).round().byte().permute(1, 2, 0).numpy()
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(files[-1])
    got = {"crop_all": load_images(files)}
    for i, file in enumerate(files):
        got |= {f"{mode}_{i}": load_images([file], mode) for mode in ("crop", "pad")}
        got[f"square_{i}"], got[f"coords_{i}"] = load_square_images([file], 280)
    assert wrong(got, want, PIXELS) == {}
