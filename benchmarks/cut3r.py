"""CUT3R against a plain implementation that does everything view after view, and how memory grows with views.

    python -m benchmarks 8                # rollouts, sequences and memory of inference
    python -m benchmarks cut3r memory     # a part of them
    python -m benchmarks cut3r training   # a training step, and its memory by number of views
    python -m benchmarks cut3r full       # the 748 M parameter model, 224 px: some minutes on one core

The plain one shares our weights, and does what the release does: encoder, ray encoder (on zeros, where there is no ray
map), decoders and heads once a view, rotary tables in every attention, attention where there is a single key.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Row, assert_close, compare, environment, pin_threads, record, resident_kib
from restrike.models import build
from restrike.models.cut3r import CUT3R, Predictions, Stream
from restrike.models.cut3r.heads import Tokens
from restrike.models.cut3r.positions import state_positions, with_pose_token
from restrike.models.cut3r.truncation import TruncatedSequence
from restrike.models.layers.rotary import grid_positions, rotary_table

COMMAND = "python -m benchmarks cut3r"
TOLERANCE = 1e-3  # outputs are exponentials, so rounding is magnified
SMALL = {
    "enc_embed_dim": 384, "enc_depth": 6, "enc_num_heads": 6, "dec_embed_dim": 288, "dec_depth": 4,
    "dec_num_heads": 6, "state_dec_num_heads": 6, "state_size": 256, "local_mem_size": 64,
}  # fmt: skip
TINY = {
    "enc_embed_dim": 256, "enc_depth": 4, "enc_num_heads": 8, "dec_embed_dim": 192, "dec_depth": 4,
    "dec_num_heads": 6, "state_dec_num_heads": 8, "state_size": 100, "local_mem_size": 48,
}  # fmt: skip
LENGTHS = (8, 32, 256)  # views
CHUNK = 8  # views that a stream is given at a time


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def mlp(layer: nn.Module, x: Tensor) -> Tensor:
    return linear(layer.fc2, F.gelu(linear(layer.fc1, x)))


def plain_rotation(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE of [B, num_heads, N, head_dim] as its papers give it: one half by y, one by x, at positions [N, 2]."""
    halves = []
    for half, place in zip(x.chunk(2, dim=-1), positions.unbind(-1), strict=True):
        first, second = half.chunk(2, dim=-1)
        quarter = first.shape[-1]
        angles = place[:, None] * 100.0 ** -(torch.arange(quarter) / quarter)
        angles = torch.cat([angles, angles], dim=-1)
        halves.append(half * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin())
    return torch.cat(halves, dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, at: tuple[Tensor, Tensor] | None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if at is not None:
        q, k = (plain_rotation(x, p) for x, p in zip((q, k), at, strict=True))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def self_attention(layer: nn.Module, x: Tensor, at: Tensor | None) -> Tensor:
    q, k, v = linear(layer.qkv, x).chunk(3, dim=-1)
    return linear(layer.proj, attend(q, k, v, layer.num_heads, None if at is None else (at, at)))


def plain_block(block: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    x = x + self_attention(block.attn, block.norm1(x), at)
    return x + mlp(block.mlp, block.norm2(x))


def decoder_block(block: nn.Module, x: Tensor, y: Tensor, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
    x = x + self_attention(block.attn, block.norm1(x), None if at is None else at[0])
    cross, normed = block.cross_attn, block.norm_y(y)
    q, k, v = linear(cross.projq, block.norm2(x)), linear(cross.projk, normed), linear(cross.projv, normed)
    x = x + linear(cross.proj, attend(q, k, v, cross.num_heads, at))
    return x + mlp(block.mlp, block.norm3(x))


class PlainCUT3R:
    """View after view, images only, with the weights of `net`."""

    def __init__(self, net: CUT3R) -> None:
        self.net = copy.deepcopy(net)
        for layer in self.net.downstream_head.modules():
            if isinstance(layer, nn.Linear):
                layer.__class__ = nn.Linear  # torch's own kernel

    def __call__(self, images: Tensor) -> Predictions:
        net, outputs = self.net, []
        state = linear(net.decoder_embed_state, net.register_tokens.weight)[None].expand(len(images), -1, -1)
        memory = net.pose_retriever.mem.expand(len(images), -1, -1)
        for i in range(images.shape[1]):
            out, state, memory = self.view(images[:, i], state, memory, i == 0)
            outputs.append(out)
        return Predictions(*(torch.stack(x, dim=1) for x in zip(*outputs, strict=True)))

    def view(self, image: Tensor, state: Tensor, memory: Tensor, is_first: bool) -> tuple[Predictions, Tensor, Tensor]:
        net, size = self.net, (image.shape[-2], image.shape[-1])
        grid = grid_positions(size[0] // net.patch_size, size[1] // net.patch_size)
        tokens = net.patch_embed(image)
        for block in net.enc_blocks:
            tokens = plain_block(block, tokens, grid)
        tokens = net.enc_norm(tokens)
        rays = net.patch_embed_ray_map(image.new_zeros(len(image), 6, *size))
        for block in net.enc_blocks_ray_map:
            rays = plain_block(block, rays, grid)
        tokens = tokens + 0 * net.enc_norm_ray_map(rays)
        key = linear(net.pose_retriever.proj_q, tokens.mean(dim=1, keepdim=True))
        pose = net.pose_token.expand(len(image), -1, -1) if is_first else self.read(key, memory)
        at = with_pose_token(grid), state_positions(state.shape[1], net.state_pe)
        x, taps = torch.cat([pose, linear(net.decoder_embed, tokens)], dim=1), []
        for depth, (block, state_block) in enumerate(zip(net.dec_blocks, net.dec_blocks_state, strict=True), 1):
            x, state = decoder_block(block, x, state, at), decoder_block(state_block, state, x, at[::-1])
            taps += [x[:, 1:]] * net.taps.count(depth)
        x, state = net.dec_norm(x), net.dec_norm_state(state)
        feature = torch.cat([key, x[:, :1]], dim=-1)
        for block in net.pose_retriever.write_blocks:
            memory = decoder_block(block, memory, feature)
        table = rotary_table(grid, net.dec_head_dims[0])
        return net.downstream_head(Tokens(tokens, *taps, x), size, table), state, memory

    def read(self, key: Tensor, memory: Tensor) -> Tensor:
        memory_of = self.net.pose_retriever
        x = torch.cat([key, memory_of.masked_token.expand_as(key)], dim=-1)
        for block in memory_of.read_blocks:
            x = decoder_block(block, x, memory)
        return x[..., memory_of.dim :]


def pictures(views: int, size: tuple[int, int], batch: int = 1) -> Tensor:
    return torch.rand(batch, views, 3, *size, generator=torch.Generator().manual_seed(views)) * 2 - 1


def built(name: str, **sizes: object) -> CUT3R:
    torch.manual_seed(0)
    return build(name, **sizes).eval()


@torch.no_grad()
def inference(
    title: str,
    net: CUT3R,
    views: int,
    size: tuple[int, int],
    rounds: int = 9,
    warmup: int = 1,
) -> Row:
    images, peer = pictures(views, size), PlainCUT3R(net)
    for ours, theirs in zip(net(images), peer(images), strict=True):
        assert_close(ours, theirs, TOLERANCE)
    timing = compare(lambda: net(images), lambda: peer(images), rounds=rounds, warmup=warmup, clock=time.process_time)
    return Row.of(
        timing,
        name=f"CUT3R inference, {title}, {views} views of {size[1]}x{size[0]}, 1 thread",
        peer_name="plain, view by view",
        checked=f"all six outputs within {TOLERANCE:g}",
        command=COMMAND,
    )


def streamed(stream: Stream, images: Tensor) -> Predictions:
    """All views through a stream, some at a time, from a new scene on."""
    stream.reset()
    parts = [stream.steps(views) for views in images.split(CHUNK, dim=1)]
    return Predictions(*(torch.cat(chunks, dim=1) for chunks in zip(*parts, strict=True)))


@torch.no_grad()
def rollout(net: CUT3R, views: int, size: tuple[int, int]) -> Row:
    """A stream, whose memory does not grow, against the plain one."""
    images, peer, stream = pictures(views, size), PlainCUT3R(net), Stream(net)
    for ours, theirs in zip(streamed(stream, images), peer(images), strict=True):
        assert_close(ours, theirs, TOLERANCE)
    timing = compare(
        lambda: streamed(stream, images), lambda: peer(images), rounds=7, warmup=0, clock=time.process_time
    )
    return Row.of(
        timing,
        name=f"CUT3R rollout, tiny, {views} views of {size[1]}x{size[0]} in a stream, 1 thread",
        peer_name="plain, view by view",
        checked=f"all six outputs within {TOLERANCE:g}",
        command=COMMAND,
    )


def training(views: int, size: tuple[int, int]) -> Row:
    net = built("cut3r_224_linear", **SMALL).train()
    peer, images = PlainCUT3R(net), pictures(views, size)

    def step(run: Callable[[Tensor], Predictions]) -> Tensor:
        return sum(x.square().mean().log1p() for x in run(images))

    def ours() -> None:
        net.zero_grad()
        step(net).backward()

    def theirs() -> None:
        peer.net.zero_grad()
        step(peer).backward()

    ours(), theirs()
    name = "dec_blocks_state.0.mlp.fc1.weight"
    assert_close(net.get_parameter(name).grad, peer.net.get_parameter(name).grad, TOLERANCE)
    return Row.of(
        compare(ours, theirs, clock=time.process_time),
        name=f"CUT3R training step, small, {views} views of {size[1]}x{size[0]}, 1 thread",
        peer_name="plain, view by view",
        checked=f"a gradient within {TOLERANCE:g}",
        command=COMMAND,
    )


def peak_mib(views: int, *how: str) -> float:
    """Peak memory of a fresh process that looks at so many views; see `look`."""
    arguments = [sys.executable, "-m", "benchmarks.cut3r", "--look", str(views), "--how", *how]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()[-1])


def growth_mib(few: int, many: int, *how: str) -> float:
    """Memory that each further view takes."""
    return (peak_mib(many, *how) - peak_mib(few, *how)) / (many - few)


def look(views: int, how: list[str]) -> None:
    """What that process does: "stream" or "whole" inference, or training ("all", "frozen", "checkpointing",
    "truncated")."""
    size = (224, 224)
    sizes = TINY if how in (["stream"], ["whole"]) else SMALL
    net = built("cut3r_224_linear", **sizes, grad_checkpointing="checkpointing" in how)
    if "stream" in how:
        stream, view = Stream(net), pictures(1, size)[:, 0]
        for _ in range(views):
            stream.step(view)
    elif "whole" in how:
        with torch.no_grad():
            net(pictures(views, size))
    else:
        train_once(net.train(), pictures(views, size), how)
    print(resident_kib("VmHWM") / 1024)


def train_once(net: CUT3R, images: Tensor, how: list[str]) -> None:
    """Forward and backward of one scene."""

    def loss(predictions: Predictions) -> Tensor:
        return sum(x.square().mean().log1p() for x in predictions)

    if "frozen" in how or "truncated" in how:
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not name.startswith(("enc_", "patch_embed", "masked")))
        net.enc_blocks.eval()
    if "truncated" in how:
        with torch.no_grad():
            encoded = net.encode(images)
        sequence = TruncatedSequence(net, encoded, lambda predictions, *_: {"loss": loss(predictions)})
        while not sequence.is_done:
            sequence.next_losses()["loss"].backward()
    else:
        loss(net(images)).backward()


def inference_memory() -> Row:
    """The stream's must not grow."""
    few, many = 8, 256
    return Row(
        name=f"CUT3R inference memory per further view, tiny, 224x224 (stream: {few} to {many}, whole: to 40)",
        ours=f"{growth_mib(few, many, 'stream'):.2f} MiB (stream)",
        peer=f"{growth_mib(few, 40, 'whole'):.1f} MiB (whole sequence at once)",
        command=f"`{COMMAND}`",
    )


def training_memory() -> list[Row]:
    """Growth of a training step's peak, plain and with each option."""
    rows, plain = [], 0.0
    options = (["all"], ["frozen"], ["checkpointing"], ["frozen", "checkpointing"], ["truncated"])
    for how in (*options, ["truncated", "checkpointing"]):
        few, many = (16, 32) if "truncated" in how else (4, 12)
        growth = growth_mib(few, many, *how)
        plain = plain or growth
        title = ", ".join(how).replace("all", "all activations").replace("frozen", "frozen encoder")
        rows.append(
            Row(
                name=f"CUT3R training memory per further view, small, 224x224: {title}",
                ratio=f"{plain / growth:.1f}x",
                ours=f"{growth:.2f} MiB",
                peer=f"{plain:.1f} MiB (all activations)",
                command=f"`{COMMAND}`",
            )
        )
    return rows


def rollouts() -> list[Row]:
    """Streams of growing length."""
    net = built("cut3r_224_linear", **TINY)
    return [rollout(net, views, (80, 80)) for views in LENGTHS]


def sequences() -> list[Row]:
    """Whole sequences of a larger model."""
    linear_net = built("cut3r_224_linear", **SMALL)
    dpt_net = built("cut3r_512_dpt", **SMALL, dpt_features=64, dpt_out_channels=(24, 48, 96, 192))
    return [
        inference("small, linear head", linear_net, 8, (112, 112)),
        inference("small, DPT head", dpt_net, 4, (112, 112)),
    ]


def memory() -> list[Row]:
    """What a further view costs in inference."""
    return [inference_memory()]


def trainings() -> list[Row]:
    """A training step, and what a further view costs it."""
    return [training(4, (112, 112)), *training_memory()]


def full() -> list[Row]:
    """The released size."""
    net, title = built("cut3r_224_linear"), "748 M parameters, linear head"
    return [inference(title, net, 2, (224, 224), rounds=7, warmup=0)]


GROUPS = {"rollouts": rollouts, "sequences": sequences, "memory": memory, "training": trainings, "full": full}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="?", choices=GROUPS)
    parser.add_argument("--look", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--how", nargs="*", default=[], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    pin_threads(1)
    if chosen.look:
        look(chosen.look, chosen.how)
        return
    command = f"`{COMMAND} {chosen.part}`"
    record(*(dataclasses.replace(row, command=command) for row in GROUPS[chosen.part]()), where=environment())


if __name__ == "__main__":
    main()
