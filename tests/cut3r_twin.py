"""CUT3R written down a second time, slowly: view after view, sample after sample, from the paper and the parameters.

The definition that the fast model is compared with, values and gradients. It shares no code with it: weights come by
their released names, and nothing is batched, cached, cut short or left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


class Sizes(NamedTuple):
    """What shapes alone do not tell."""

    enc_num_heads: int
    dec_num_heads: int
    state_dec_num_heads: int
    state_pe: str = "2d"
    half_rotary: bool = False
    ray_num_heads: int = 16
    patch: int = 16


def twin_forward(
    w: Weights,
    sizes: Sizes,
    images: Tensor,
    rays: Tensor,
    image_mask: Tensor,
    ray_mask: Tensor,
    reset: Tensor,
    update: Tensor,
    masked_tokens: bool = True,
    masked_ray_scope: str = "batch",
) -> dict[str, Tensor]:
    """Outputs [B, V, ...] of images [B, V, 3, H, W] and ray maps [B, V, H, W, 6]; masks are [B, V] bool."""
    scenes = []
    for b in range(len(images)):
        has_rays = bool(ray_mask.any() if masked_ray_scope == "batch" else ray_mask[b].any())
        state = linear(w, "decoder_embed_state", w["register_tokens.weight"])
        memory = w["pose_retriever.mem"][0]
        first, views = (state, memory), []
        for i in range(images.shape[1]):
            shown = bool(image_mask[b, i]), bool(ray_mask[b, i])
            tokens = encode(w, sizes, images[b, i], rays[b, i], *shown, has_rays, masked_tokens)
            grid = images.shape[-2] // sizes.patch, images.shape[-1] // sizes.patch
            at = positions(grid, any(shown))
            out, new_state, new_memory = view(w, sizes, tokens, state, memory, at, grid, i == 0)
            views.append(out)
            if shown[0] and bool(update[b, i]):
                state, memory = new_state, new_memory
            if bool(reset[b, i]):
                state, memory = first
        scenes.append({name: torch.stack([out[name] for out in views]) for name in views[0]})
    return {name: torch.stack([scene[name] for scene in scenes]) for name in scenes[0]}


def positions(grid: tuple[int, int], is_present: bool) -> Tensor:
    return torch.tensor([[y, x] for y in range(grid[0]) for x in range(grid[1])]) * int(is_present)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x)))


def turn(x: Tensor, at: Tensor) -> Tensor:
    """[N, d] at [N, 2]: the first half of the channels with y, the second with x; channel k is paired with k + d/4."""
    quarter, parts = x.shape[-1] // 4, []
    for axis in (0, 1):
        u, v = (
            x[:, 2 * axis * quarter : (2 * axis + 1) * quarter],
            x[:, (2 * axis + 1) * quarter : (2 * axis + 2) * quarter],
        )
        frequency = torch.tensor([100 ** (-k / quarter) for k in range(quarter)])
        angle = at[:, axis, None].float() * frequency
        parts += [u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()]
    return torch.cat(parts, dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, at: tuple[Tensor, Tensor] | None, half: bool = False) -> Tensor:
    outs = []
    for qh, kh, vh in zip(*(x.chunk(heads, dim=-1) for x in (q, k, v)), strict=True):
        if half:
            qh, kh = qh.half(), kh.half()
        if at is not None:
            qh, kh = turn(qh, at[0]), turn(kh, at[1])
        if half:
            qh, kh = qh.half().float(), kh.half().float()
        outs.append(((qh @ kh.T) / math.sqrt(qh.shape[-1])).softmax(dim=-1) @ vh)
    return torch.cat(outs, dim=-1)


def self_attention(w: Weights, name: str, x: Tensor, heads: int, at: Tensor | None, half: bool = False) -> Tensor:
    q, k, v = linear(w, f"{name}.qkv", x).chunk(3, dim=-1)
    return linear(w, f"{name}.proj", attend(q, k, v, heads, None if at is None else (at, at), half))


def block(w: Weights, name: str, x: Tensor, heads: int, at: Tensor, half: bool = False) -> Tensor:
    x = x + self_attention(w, f"{name}.attn", norm(w, f"{name}.norm1", x), heads, at, half)
    return x + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm2", x))


def decoder_block(
    w: Weights, name: str, x: Tensor, y: Tensor, heads: int, at: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    x = x + self_attention(w, f"{name}.attn", norm(w, f"{name}.norm1", x), heads, None if at is None else at[0])
    queries, keys = norm(w, f"{name}.norm2", x), norm(w, f"{name}.norm_y", y)
    cross = f"{name}.cross_attn"
    q, k, v = (linear(w, f"{cross}.{n}", t) for n, t in (("projq", queries), ("projk", keys), ("projv", keys)))
    x = x + linear(w, f"{cross}.proj", attend(q, k, v, heads, at))
    return x + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm3", x))


def depth_of(w: Weights, name: str) -> int:
    return len({n.removeprefix(f"{name}.").split(".")[0] for n in w if n.startswith(f"{name}.")})


def encode(
    w: Weights,
    sizes: Sizes,
    image: Tensor,
    ray_map: Tensor,
    has_image: bool,
    has_ray: bool,
    any_ray: bool,
    masked: bool,
) -> Tensor:
    """Tokens [N, enc_dim] of one view."""
    at = positions((image.shape[-2] // sizes.patch, image.shape[-1] // sizes.patch), True)

    def patches(name: str, x: Tensor) -> Tensor:
        out = F.conv2d(x[None], w[f"{name}.proj.weight"], w[f"{name}.proj.bias"], stride=sizes.patch)[0]
        return out.flatten(1).T

    nothing = torch.zeros(len(at), w["masked_img_token"].shape[-1])
    tokens = nothing + (w["masked_img_token"] if masked else 0)
    if has_image:
        tokens = patches("patch_embed", image)
        for i in range(depth_of(w, "enc_blocks")):
            tokens = block(w, f"enc_blocks.{i}", tokens, sizes.enc_num_heads, at, sizes.half_rotary)
        tokens = norm(w, "enc_norm", tokens)
    rays = nothing + (w["masked_ray_map_token"] if masked and any_ray else 0)
    if has_ray:
        rays = patches("patch_embed_ray_map", ray_map.permute(2, 0, 1))
        for i in range(depth_of(w, "enc_blocks_ray_map")):
            rays = block(w, f"enc_blocks_ray_map.{i}", rays, sizes.ray_num_heads, at)
        rays = norm(w, "enc_norm_ray_map", rays)
    return tokens + rays


def view(
    w: Weights,
    sizes: Sizes,
    tokens: Tensor,
    state: Tensor,
    memory: Tensor,
    at: Tensor,
    grid: tuple[int, int],
    is_first: bool,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Outputs of one view, and the state and memory that it would leave."""
    heads, memory_of = sizes.dec_num_heads, "pose_retriever"
    key = linear(w, f"{memory_of}.proj_q", tokens.mean(dim=0, keepdim=True))
    dim = key.shape[-1]
    pose = w["pose_token"][0]
    if not is_first:
        read = torch.cat([key, w[f"{memory_of}.masked_token"][0]], dim=-1)
        for i in range(2):
            read = decoder_block(w, f"{memory_of}.read_blocks.{i}", read, memory, heads)
        pose = read[:, dim:]
    x, y = torch.cat([pose, linear(w, "decoder_embed", tokens)]), state
    at_view, at_state = torch.cat([torch.tensor([[-1, -1]]), at]), state_positions(len(state), sizes.state_pe)
    depth, layers = depth_of(w, "dec_blocks"), []
    for i in range(depth):
        x, y = (
            decoder_block(w, f"dec_blocks.{i}", x, y, heads, (at_view, at_state)),
            decoder_block(w, f"dec_blocks_state.{i}", y, x, sizes.state_dec_num_heads, (at_state, at_view)),
        )
        layers.append(x[1:])
    x, y = norm(w, "dec_norm", x), norm(w, "dec_norm_state", y)
    written = memory
    for i in range(2):
        written = decoder_block(w, f"{memory_of}.write_blocks.{i}", written, torch.cat([key, x[:1]], dim=-1), heads)
    read_by_head = [tokens, layers[depth * 2 // 4 - 1], layers[depth * 3 // 4 - 1], x[1:]]
    return head(w, sizes, read_by_head, x[:1], at, grid), y, written


def state_positions(size: int, kind: str) -> Tensor:
    if kind == "1d":
        return torch.tensor([[i, i] for i in range(size)])
    width = math.floor(math.sqrt(size))
    width += width % 2
    return torch.tensor([[i // width, i % width] for i in range(size)])


def head(
    w: Weights, sizes: Sizes, levels: list[Tensor], pose_token: Tensor, at: Tensor, grid: tuple[int, int]
) -> dict[str, Tensor]:
    name, shared = "downstream_head", levels[-1]
    for i in range(2):
        part = f"{name}.final_transform.{i}"

        def modulated(which: str, x: Tensor, part: str = part) -> Tensor:
            shift, scale = linear(w, f"{part}.{which}.mlp.1", F.silu(pose_token)).chunk(2, dim=-1)
            return norm(w, f"{part}.{which}.norm", x) * (1 + scale) + shift

        shared = shared + self_attention(w, f"{part}.attn", modulated("norm1", shared), sizes.dec_num_heads, at)
        shared = shared + mlp(w, f"{part}.mlp", modulated("norm2", shared))
    is_linear = f"{name}.proj.fc1.weight" in w
    if is_linear:
        own, world, color = (
            unfold(mlp(w, f"{name}.{part}", x), grid, sizes.patch)
            for part, x in (("proj", levels[-1]), ("cross_proj", shared), ("rgb_proj", levels[-1]))
        )
    else:
        own, world, color = (
            dpt(w, f"{name}.{part}", [*levels[:3], x], grid)
            for part, x in (("dpt_self", levels[-1]), ("dpt_cross", shared), ("dpt_rgb", levels[-1]))
        )
    raw_pose = mlp(w, f"{name}.pose_head.mlp", pose_token)[0]
    quaternion = raw_pose[3:] / raw_pose[3:].norm()
    return {
        "points_camera": points(own[:3], is_linear),
        "confidence_camera": 1 + own[3].exp(),
        "points_world": points(world[:3], False),
        "confidence_world": 1 + world[3].exp(),
        "colors": (2 * (color.sigmoid() * (1 - 2e-6) + 1e-6) - 1).permute(1, 2, 0),
        "poses": torch.cat([stretch(raw_pose[:3]), -quaternion if quaternion[0] < 0 else quaternion]),
    }


def unfold(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Tokens [N, C p p] to [C, H, W]: channel c p p + p dy + dx."""
    x = x.reshape(*grid, -1, patch, patch)
    return x.permute(2, 0, 3, 1, 4).reshape(-1, grid[0] * patch, grid[1] * patch)


def points(raw: Tensor, faces_forward: bool) -> Tensor:
    xyz = raw.permute(1, 2, 0)
    return stretch(xyz * xyz[..., 2:].sign() if faces_forward else xyz)


def stretch(x: Tensor) -> Tensor:
    length = x.norm(dim=-1, keepdim=True)
    return x / length.clamp(min=1e-8) * torch.expm1(length)


def dpt(w: Weights, name: str, levels: list[Tensor], grid: tuple[int, int]) -> Tensor:
    def conv(part: str, x: Tensor, **how: int) -> Tensor:
        return F.conv2d(x, w[f"{name}.{part}.weight"], w.get(f"{name}.{part}.bias"), **how)

    def residual(part: str, x: Tensor) -> Tensor:
        return x + conv(f"{part}.conv2", conv(f"{part}.conv1", x.relu(), padding=1).relu(), padding=1)

    maps = []
    for i, tokens in enumerate(levels):
        x = conv(f"act_postprocess.{i}.0", tokens.T.reshape(1, -1, *grid))
        if i < 2:
            up, stride = f"{name}.act_postprocess.{i}.1", (4, 2)[i]
            x = F.conv_transpose2d(x, w[f"{up}.weight"], w[f"{up}.bias"], stride=stride)
        elif i == 3:
            x = conv("act_postprocess.3.1", x, stride=2, padding=1)
        maps.append(conv(f"scratch.layer{i + 1}_rn", x, padding=1))
    z = None
    for i in (3, 2, 1, 0):
        part = f"scratch.refinenet{i + 1}"
        z = (
            maps[i]
            if z is None
            else z[..., : maps[i].shape[-2], : maps[i].shape[-1]] + residual(f"{part}.resConfUnit1", maps[i])
        )
        z = F.interpolate(residual(f"{part}.resConfUnit2", z), scale_factor=2, mode="bilinear", align_corners=True)
        z = conv(f"{part}.out_conv", z)
    z = F.interpolate(conv("head.0", z, padding=1), scale_factor=2, mode="bilinear", align_corners=True)
    return conv("head.4", conv("head.2", z, padding=1).relu())[0]
