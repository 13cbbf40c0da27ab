"""DiffusionSfM against a plain implementation of its published steps, on a CPU, float32, in one process.

    python -m benchmarks diffusionsfm           # all rows of docs/benchmarks.md
    python -m benchmarks diffusionsfm cameras   # a part of them: rays, cameras, sparse or dense

The peer has the same weights and does what the release's description says, step by step: shifts, scales and gates of
every block at every step, maps upsampled before they are convolved, 1x1 convolutions after upsampling, a hundred calls,
rays and cameras one after another. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from time import process_time

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Row, Timing, assert_close, compare, environment, pin_threads, record
from restrike import geometry as g
from restrike.losses import ray_loss
from restrike.models import build
from restrike.models.diffusionsfm import ndc_coordinates, sample_rays
from restrike.models.diffusionsfm.embeddings import timestep_features

COMMAND = "python -m benchmarks diffusionsfm"
TOLERANCE = 1e-4
SMALL = {"hidden_size": 192, "num_heads": 4}
TINY = {"hidden_size": 96, "num_heads": 4, "depth": 8}  # for a peer that is called a hundred times


# The peer.


def plain_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def plain_time(embedder: nn.Module, timesteps: Tensor) -> Tensor:
    hidden = F.silu(plain_linear(embedder.mlp[0], timestep_features(timesteps)))
    return plain_linear(embedder.mlp[2], hidden)


def plain_attention(attention: nn.Module, x: Tensor) -> Tensor:
    batch, tokens, dim = x.shape
    q, k, v = plain_linear(attention.qkv, x).view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
    return plain_linear(attention.proj, mixed)


def plain_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def plain_encode(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Image features and, dense, the two maps of the encoder."""
    side = model.width
    taps = model.encoder_taps if model.is_dense else ()
    tokens, found = model.feature_extractor.model.forward_features(images.flatten(0, 1), taps)
    maps = []
    for project, tap in zip(getattr(model, "project_opers", ()), found, strict=False):
        joined = torch.cat([tap[:, 1:], tap[:, :1].expand_as(tap[:, 1:])], dim=-1)
        maps.append(F.gelu(plain_linear(project.project[0], joined)).mT.unflatten(-1, (side, side)))
    return tokens[:, 1:].mT.unflatten(-1, (side, side)).unflatten(0, images.shape[:2]), maps


def plain_denoise(model: nn.Module, encoded: tuple[Tensor, list[Tensor]], noisy: Tensor, coords: Tensor, times: Tensor):
    """Clean rays, the published way."""
    features, image_maps = encoded
    batch, views, side = noisy.shape[0], noisy.shape[1], model.width
    x = torch.cat([noisy, torch.ones_like(noisy[:, :, :1])], dim=2)
    if model.is_dense:
        rays = model.scratch.input_conv(x.flatten(0, 1)).unflatten(0, (batch, views))
    else:
        rays = plain_linear(model.scratch.input_conv, x.movedim(2, -1)).movedim(-1, 2)
    net = model.ray_predictor
    x = net.x_embedder.proj(torch.cat([features, rays, coords], dim=2).flatten(0, 1))
    x = x.flatten(2).mT.unflatten(0, (batch, views))
    x = (x + net.x_pos_enc.image_pos_table[:, :views, None] + net.x_pos_enc.token_pos_table[:, None]).flatten(1, 2)
    time, ray_maps = plain_time(net.t_embedder, times), []
    for i, block in enumerate(net.blocks):
        modulation = plain_linear(block.adaLN_modulation[1], F.silu(time)).chunk(6, dim=-1)
        x = x + modulation[2][:, None] * plain_attention(block.attn, plain_norm(x, *modulation[:2]))
        hidden = F.gelu(plain_linear(block.mlp.fc1, plain_norm(x, *modulation[3:5])), approximate="tanh")
        x = x + modulation[5][:, None] * plain_linear(block.mlp.fc2, hidden)
        if i in model.taps:
            ray_maps.append(x.view(batch * views, side, side, -1).permute(0, 3, 1, 2))
    shift, scale = plain_linear(net.final_layer.adaLN_modulation[1], F.silu(time)).chunk(2, dim=-1)
    out = plain_linear(net.final_layer.linear, plain_norm(x, shift, scale))
    if not model.is_dense:
        return out.view(batch, views, side, side, 8).permute(0, 1, 4, 2, 3)
    return plain_decode(model.scratch, [*image_maps, *ray_maps], times.repeat_interleave(views)).unflatten(
        0, (batch, views)
    )


def plain_decode(decoder: nn.Module, maps: list[Tensor], times: Tensor) -> Tensor:
    factors = (8, 4, 2, 1)
    levels = [
        getattr(decoder, f"layer{i}_rn")(F.interpolate(x, scale_factor=factor, mode="nearest"))
        for i, (x, factor) in enumerate(zip(maps, factors, strict=True), 1)
    ]
    x = levels[3]
    for i in (4, 3, 2, 1):
        step = getattr(decoder, f"refinenet{i}")
        if i < 4:
            unit = step.resConfUnit1
            x = x + unit.conv2(F.relu(unit.conv1(F.relu(levels[i - 1])))) + levels[i - 1]
        unit = step.resConfUnit2
        modulation = plain_linear(unit.adaLN_modulation[1], F.silu(plain_time(unit.t_embedder, times)))
        shift, scale, gate = modulation[..., None, None].chunk(3, dim=1)
        x = x * (1 + scale) + shift
        x = gate * unit.conv2(F.relu(unit.conv1(F.relu(x)))) + x
        x = step.out_conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
    return decoder.output_conv(x)


@torch.no_grad()
def plain_sample(model: nn.Module, images: Tensor, coords: Tensor, state: Tensor, calls: int) -> tuple[Tensor, Tensor]:
    """The published loop over 100 times, stopped after `calls`: predictions of the eleventh and of the last call."""
    encoded, kept = plain_encode(model, images), model.noise_scheduler.alphas_cumprod.double()
    eleventh = prediction = state
    for call, time in enumerate(reversed(range(100 - calls, 100))):
        raw = plain_denoise(model, encoded, state, coords, torch.full((len(state),), time))
        prediction = F.normalize(raw.unflatten(2, (2, 4)), dim=3).flatten(2, 3)
        now, after = float(kept[time]), float(kept[time - 1]) if time else 1.0
        noise = (state - math.sqrt(now) * prediction) / math.sqrt(1 - now)
        variance = (1 - after) / (1 - now) * (1 - now / after)
        state = math.sqrt(after) * prediction + math.sqrt(max(0.0, 1 - after - variance)) * noise
        eleventh = prediction if call == 10 else eleventh
    return eleventh, prediction


# Rows.


def opened(name: str, **sizes: object) -> nn.Module:
    """A model whose gates are open, so that every part shows in the output."""
    torch.manual_seed(0)
    model = build(name, **sizes).eval()
    with torch.no_grad():
        for block in model.ray_predictor.blocks:
            block.adaLN_modulation[1].weight.normal_(std=0.02)
    return model


def inputs(model: nn.Module, views: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, views, 3, model.img_size, model.img_size, generator=generator)
    noise = torch.randn(batch, views, 8, model.map_size, model.map_size, generator=generator)
    boxes = torch.tensor([0.0, 0.0, 480.0, 480.0]).expand(batch, views, 4)
    return images, ndc_coordinates(boxes, torch.tensor([480, 640]).expand(batch, views, 2), model.width), noise


def sampling(name: str, title: str, views: int, calls: int, peer_calls: int, **sizes: object) -> Row:
    """Ours stops after `calls`, the peer after `peer_calls`; what is compared is the prediction that ours returns."""
    model = opened(name, **sizes)
    images, coords, noise = inputs(model, views)
    which = 0 if peer_calls > calls else 1
    ours = sample_rays(model, coords, images, num_calls=calls, noise=noise).prediction
    error = assert_close(ours, plain_sample(model, images, coords, noise, peer_calls)[which], TOLERANCE)
    timing = _compare(
        lambda: sample_rays(model, coords, images, num_calls=calls, noise=noise),
        lambda: plain_sample(model, images, coords, noise, peer_calls),
    )
    return _row(timing, title, "plain steps", f"rays, error {error:.0e}")


def training_step(name: str, title: str, views: int, **sizes: object) -> Row:
    """Forward and backward of one batch, image encoder frozen."""
    model = opened(name, **sizes).train()
    model.feature_extractor.requires_grad_(False)
    images, coords, noise = inputs(model, views)
    target, mask, times = torch.ones_like(noise) / 2, torch.ones_like(noise[:, :, 0]), torch.tensor([50])
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(predict: Callable[[], Tensor]) -> Tensor:
        found = torch.autograd.grad(ray_loss(predict(), target, mask), parameters, allow_unused=True)
        return torch.cat([x.flatten() for x in found if x is not None])

    def ours() -> Tensor:
        return gradients(lambda: model(images, noise, coords, times))

    def peer() -> Tensor:
        return gradients(lambda: plain_denoise(model, plain_encode(model, images), noise, coords, times))

    error = assert_close(ours(), peer(), 1e-3)
    return _row(_compare(ours, peer), title, "plain steps", f"gradients, error {error:.0e}")


def scene_rays(batch: int, views: int, patches: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates, depth, intrinsics and cameras in PyTorch3D's axes and NDC, [B, V, …]."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, views, *shape, generator=generator)

    boxes = torch.tensor([0.0, 0.0, 480.0, 480.0]) + 20 * draw(1).tanh()
    parameters = g.crop_parameters(boxes, torch.tensor([480, 640]).expand(batch, views, 2))
    cameras = g.make_se3(g.axis_angle_to_matrix(0.3 * draw(3)), draw(3))
    intrinsics = g.make_intrinsics(3 + 0.1 * draw(2), 0.02 * draw(2))
    return g.patch_centers(parameters, patches).float(), 3 + 0.5 * draw(patches, patches), intrinsics, cameras


def plain_rays(coords: Tensor, depth: Tensor, intrinsics: Tensor, cameras: Tensor) -> Tensor:
    """Camera by camera, with 4x4 inverses."""
    rows = []
    for b in range(len(coords)):
        views = []
        for v in range(coords.shape[1]):
            camera = torch.eye(4)
            camera[:3] = cameras[b, v]
            to_world = torch.inverse(camera)
            xy = (coords[b, v].flatten(0, 1) - intrinsics[b, v, :2, 2]) / intrinsics[b, v].diagonal()[:2]
            points = torch.cat([xy, torch.ones_like(xy[:, :1])], dim=-1) * depth[b, v].flatten()[:, None]
            endpoints = (torch.cat([points, torch.ones_like(points[:, :1])], dim=-1) @ to_world.T)[:, :3]
            origins = to_world[:3, 3].expand_as(endpoints)
            vectors = [torch.cat([x, torch.ones_like(x[:, :1])], dim=-1) for x in (origins, endpoints)]
            both = torch.cat([x / x.norm(dim=-1, keepdim=True) for x in vectors], dim=-1)
            views.append(both.T.view(8, *depth.shape[-2:]))
        rows.append(torch.stack(views))
    return torch.stack(rows)


def rays(batch: int = 8, views: int = 8, patches: int = 16) -> Row:
    coords, depth, intrinsics, cameras = scene_rays(batch, views, patches)

    def ours() -> Tensor:
        return g.encode_rays(*g.ray_origins_and_endpoints(coords, depth, intrinsics, cameras))

    error = assert_close(ours(), plain_rays(coords, depth, intrinsics, cameras), TOLERANCE)
    timing = _compare(ours, lambda: plain_rays(coords, depth, intrinsics, cameras))
    title = f"DiffusionSfM rays of {batch} x {views} cameras, {patches} x {patches}"
    return _row(timing, title, "a loop over cameras", f"rays, error {error:.0e}")


def plain_cameras(rays_map: Tensor, coords: Tensor) -> Tensor:
    """OpenCV's RANSAC and one decomposition a camera: rotations [B, V, 3, 3], camera to world."""
    found = []
    for one, xy in zip(rays_map.flatten(0, 1), coords.flatten(0, 1), strict=True):
        points = one.view(2, 4, -1)
        origins, endpoints = ((x[:3] / (x[3] + 1e-6)).T for x in points)
        directions = endpoints - origins.mean(0)
        targets = (directions[:, :2] / directions[:, 2:]).numpy()
        matrix = cv2.findHomography(xy.flatten(0, 1).numpy(), targets, cv2.RANSAC, 0.2)[0]
        matrix = matrix * np.sign(np.linalg.det(matrix))
        q, r = np.linalg.qr(matrix)
        found.append(torch.from_numpy(q * np.sign(np.diagonal(r))))
    return torch.stack(found).unflatten(0, coords.shape[:2])


def bundle(patches: int, noise: float, wild_share: float) -> tuple[Tensor, ...]:
    """Ray maps of 8 x 8 views, as a network would give them, coordinates, and the true world-to-camera rotations."""
    coords, depth, intrinsics, true = scene_rays(8, 8, patches)
    origins, endpoints = g.ray_origins_and_endpoints(coords, depth, intrinsics, true)
    generator = torch.Generator().manual_seed(1)
    is_wild = torch.rand(endpoints.shape[:-1], generator=generator)[..., None] < wild_share
    spread = torch.where(is_wild, 1.0, noise)
    endpoints = endpoints + spread * torch.randn(endpoints.shape, generator=generator)
    return g.encode_rays(origins, endpoints).contiguous(), coords, true[..., :3]


def solved(rays_map: Tensor, coords: Tensor, is_robust: bool = True) -> Tensor:
    """Ours: rotations [8, 8, 3, 3], world to camera."""
    origins, endpoints = (x.flatten(2, 3) for x in g.decode_rays(rays_map))
    return g.cameras_from_rays(origins, endpoints, coords.flatten(2, 3), is_robust=is_robust).world_to_camera[..., :3]


def degrees_off(rotations: Tensor, true: Tensor) -> Tensor:
    return torch.rad2deg(g.rotation_angle(g.multiply(rotations.double(), true.double().mT)))


def no_larger_errors(patches: int) -> str:
    """Median rotation errors over noise levels and shares of wild rays, ours never above OpenCV's; in words."""
    worst = 0.0
    for noise in (0.003, 0.02):
        for wild_share in (0.0, 0.02, 0.1, 0.3):
            if patches > 16 and wild_share not in (0.0, 0.1):
                continue
            rays_map, coords, true = bundle(patches, noise, wild_share)
            ours = float(degrees_off(solved(rays_map, coords), true).median())
            peer = float(degrees_off(plain_cameras(rays_map, coords).mT, true).median())
            worst = max(worst, ours / peer)
            assert ours <= 1.02 * peer, f"{noise=} {wild_share=}: {ours:.4f} degrees, OpenCV {peer:.4f}; nothing timed"
    return f"median rotation error over noise and wild rays at most {worst:.2f} of OpenCV's"


def cameras(patches: int, wild_share: float, is_robust: bool = True) -> Row:
    """Both take the right triangle; the batched solver fits 3-vectors, OpenCV a homography."""
    exact, coords, _ = bundle(patches, 0.0, 0.0)
    error = assert_close(solved(exact, coords, is_robust), plain_cameras(exact, coords).mT, 1e-3)
    checked = f"exact rays: rotations within {error:.0e}"
    if is_robust:
        checked += f"; {no_larger_errors(patches)}"
    noisy, coords, _ = bundle(patches, 0.003, wild_share)
    timing = compare(
        lambda: solved(noisy, coords, is_robust),
        lambda: plain_cameras(noisy, coords),
        rounds=7,
        warmup=1,
        min_round_s=0.2,
        clock=process_time,
    )
    kind = f"{wild_share:.0%} wild rays" if is_robust else "plain least squares, no wild rays"
    title = f"Rays to cameras, 8 scenes x 8 views, {patches} x {patches} noisy rays, {kind}"
    return _row(timing, title, "OpenCV RANSAC per camera", checked)


def _compare(ours: Callable[[], object], peer: Callable[[], object]) -> Timing:
    return compare(ours, peer, rounds=7, warmup=1, min_round_s=0.2)


def _row(timing: Timing, name: str, peer: str, checked: str) -> Row:
    return Row.of(timing, name=name, peer_name=peer, checked=checked, command=COMMAND)


def rows(names: list[str]) -> list[Callable[[], Row]]:
    few, thin = "width 192, decoder 64", {**SMALL, "decoder_features": 64}
    every: dict[str, list[Callable[[], Row]]] = {
        "rays": [rays],
        "cameras": [
            lambda: cameras(16, 0.0),
            lambda: cameras(16, 0.1),
            lambda: cameras(16, 0.0, is_robust=False),
            lambda: cameras(256, 0.0),
            lambda: cameras(256, 0.1),
        ],
        "sparse": [
            lambda: sampling("diffusionsfm_sparse", "DiffusionSfM sparse, 2 views, 1 call", 2, 1, 1),
            lambda: sampling(
                "diffusionsfm_sparse",
                "DiffusionSfM sparse (width 96, 8 blocks), 2 views, early stop",
                2,
                11,
                100,
                **TINY,
            ),
            lambda: training_step("diffusionsfm_sparse", "DiffusionSfM sparse (width 192), step, 2 views", 2, **SMALL),
        ],
        "dense": [
            lambda: sampling("diffusionsfm_dense", f"DiffusionSfM dense ({few}), 2 views, 11 calls", 2, 11, 11, **thin),
            lambda: training_step("diffusionsfm_dense", f"DiffusionSfM dense ({few}), step, 2 views", 2, **thin),
        ],
    }
    if unknown := [name for name in names if name not in every]:
        raise SystemExit(f"error: no rows called {', '.join(unknown)}: there are {', '.join(every)}")
    return [row for name in names or every for row in every[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help="rays, cameras, sparse or dense; all by default")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)
    where = f"{environment('opencv-python-headless')}; {arguments.threads} thread(s)"
    command = f"`{' '.join([COMMAND, *arguments.part])}`"
    for row in rows(arguments.part):
        record(dataclasses.replace(row(), command=command), where=where)


if __name__ == "__main__":
    main()
