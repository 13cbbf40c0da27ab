"""DiffusionSfM's model: exact rewrites, weights in and out, its border to cameras, and messages."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from parity_tools import fill_, normal
from restrike import geometry as g
from restrike.checkpoints import CheckpointError, load_released
from restrike.models import build
from restrike.models.diffusionsfm import cameras_from_ray_map, dense_from_sparse, load_images, ray_targets
from restrike.models.diffusionsfm.targets import ViewCameras
from restrike.models.diffusionsfm.upsampled_conv import conv_of_upsampled
from tiny_diffusionsfm import SIZES, tiny_diffusionsfm, toy_coords, toy_views

NAMES = ("diffusionsfm_sparse", "diffusionsfm_dense")
TIGHT = 1e-5


def noisy_inputs(model: nn.Module, batch: int = 2, views: int = 3) -> tuple[torch.Tensor, ...]:
    images = normal("images", batch, views, 3, 56, 56)
    return images, normal("noisy", batch, views, 8, model.map_size, model.map_size), toy_coords(batch, views)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_the_convolution_of_an_upsampled_map_equals_the_plain_one_with_its_gradients(factor):
    x, weight = normal("x", 2, 3, 4, 5).requires_grad_(), normal("w", 6, 3, 3, 3).requires_grad_()
    plain = F.conv2d(F.interpolate(x, scale_factor=factor, mode="nearest"), weight, padding=1)
    ours = conv_of_upsampled(x, weight, factor)
    torch.testing.assert_close(ours, plain, atol=TIGHT, rtol=TIGHT)
    direction = normal("d", *plain.shape)
    for got, want in zip(
        torch.autograd.grad((ours * direction).sum(), (x, weight)),
        torch.autograd.grad((plain * direction).sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_table_of_times_gives_what_the_times_give(name):
    model = tiny_diffusionsfm(name)
    images, noisy, coords = noisy_inputs(model)
    features, table = model.encode(images), model.time_table(torch.arange(0, 100, 7))
    for row in (0, 5, 14):
        direct = model.denoise(features, noisy, coords, torch.tensor([7 * row]))
        torch.testing.assert_close(
            model.denoise(features, noisy, coords, table.row(row)), direct, atol=TIGHT, rtol=TIGHT
        )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_scene_of_a_batch_has_its_own_time(name):
    model = tiny_diffusionsfm(name)
    images, noisy, coords = noisy_inputs(model)
    both = model(images, noisy, coords, torch.tensor([3, 80]))
    for row, time in enumerate((3, 80)):
        alone = model(*(x[row : row + 1] for x in (images, noisy, coords)), torch.tensor([time]))
        torch.testing.assert_close(both[row : row + 1], alone, atol=TIGHT, rtol=1e-4)


@torch.no_grad()
def test_the_plain_decoder_gives_the_same_rays():
    """Upsample, convolve, fuse, upsample, then 1x1: as published, step by step."""
    model = tiny_diffusionsfm("diffusionsfm_dense")
    images, noisy, coords = noisy_inputs(model, batch=1, views=2)
    decoder, times = model.scratch, torch.tensor([40])
    _, taps = model.feature_extractor.model.forward_features(images.flatten(0, 1), model.encoder_taps)
    maps = [p(tap).mT.unflatten(-1, (4, 4)) for p, tap in zip(model.project_opers, taps, strict=True)]
    mask = torch.ones_like(noisy[:, :, :1])
    x = torch.cat([model.encode(images).patches, model._embed(torch.cat([noisy, mask], 2)), coords], dim=2)
    maps += model.ray_predictor.forward_features(x, times, model.taps)[1]
    levels = [
        getattr(decoder, f"layer{i}_rn")(F.interpolate(m, scale_factor=f, mode="nearest"))
        for i, m, f in zip((1, 2, 3, 4), maps, (8, 4, 2, 1), strict=True)
    ]
    out = None
    for i in (4, 3, 2, 1):
        step, level = getattr(decoder, f"refinenet{i}"), levels[i - 1]
        out = level if out is None else out + step.resConfUnit1(level)
        out = step.resConfUnit2(out, step.resConfUnit2.modulation(times))
        out = F.interpolate(out, scale_factor=2, mode="bilinear", align_corners=True)
        out = step.out_conv(out)
    plain = decoder.output_conv(out).unflatten(0, (1, 2))
    torch.testing.assert_close(model(images, noisy, coords, times), plain, atol=1e-4, rtol=1e-4)


def test_a_fresh_block_is_the_identity_and_a_fresh_output_is_not_zero():
    torch.manual_seed(0)
    model = build("diffusionsfm_sparse", **SIZES)
    images, noisy, coords = noisy_inputs(model)
    tokens = normal("tokens", 2, 48, 32)
    for block in model.ray_predictor.blocks:
        assert torch.equal(block(tokens, normal("time", 2, 32)), tokens)
    assert model(images, noisy, coords, torch.tensor([5])).abs().max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_that_trains_gets_a_gradient(name):
    model = tiny_diffusionsfm(name).train()
    images, noisy, coords = noisy_inputs(model)
    model(images, noisy, coords, torch.tensor([5, 50])).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_diffusionsfm(name, grad_checkpointing=checkpointing).train()
        images, noisy, coords = noisy_inputs(model)
        model(images, noisy, coords, torch.tensor([5, 50])).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_the_clean_position_table_is_another_one():
    faithful, clean = tiny_diffusionsfm(), tiny_diffusionsfm(position_offset=0.0)
    images = normal("images", 1, 2, 3, 56, 56)
    difference = (faithful.encode(images).patches - clean.encode(images).patches).norm()
    assert difference > 1e-3 * faithful.encode(images).patches.norm()


def test_a_dense_model_starts_as_the_sparse_one_on_average_pooled_rays():
    sparse, dense = tiny_diffusionsfm(), tiny_diffusionsfm("diffusionsfm_dense")
    missing = dense.load_state_dict(dense_from_sparse(sparse.state_dict()), strict=False)
    assert missing.unexpected_keys == [] and all(k.startswith(("scratch.", "project_")) for k in missing.missing_keys)
    rays = normal("rays", 1, 2, 9, 64, 64)
    pooled = F.avg_pool2d(rays.flatten(0, 1), 16).unflatten(0, (1, 2))
    torch.testing.assert_close(dense._embed(rays), sparse._embed(pooled), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="sparse model.*found \\[16, 9, 16, 16\\]"):
        dense_from_sparse(dense.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_released_file_loads_strictly_for_any_number_of_views(name, tmp_path):
    written = tiny_diffusionsfm(name, max_num_images=8)
    extras = {"optimizer": {"state": {}}, "gradscaler": {"scale": 65536.0}, "iteration": 800000, "wandb_id": "x"}
    torch.save({"state_dict": written.state_dict(), **extras}, tmp_path / "ckpt_00800000.pth")
    model = build(name, **SIZES, max_num_images=12)
    assert load_released(model, tmp_path / "ckpt_00800000.pth") == ([], [])
    ours, theirs = model.state_dict(), written.state_dict()
    table = "ray_predictor.x_pos_enc.image_pos_table"
    assert ours[table].shape[1] == 12 and torch.equal(ours[table][:, :8], theirs[table])
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if key != table)
    state = written.state_dict()
    del state["ray_predictor.t_embedder.mlp.0.weight"]
    torch.save({"state_dict": state}, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match="only in the model: ray_predictor.t_embedder.mlp.0.weight"):
        load_released(model, tmp_path / "broken.pth")


def view_cameras(batch, intrinsics=None) -> ViewCameras:
    given = batch.intrinsics if intrinsics is None else intrinsics
    return ViewCameras(batch.world_to_camera, given, batch.crop_boxes, batch.source_sizes, batch.images.shape[-1])


ZOOM = 420 / 56  # of `toy_views`


def uncrop(intrinsics: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Of the whole pictures."""
    return g.crop_intrinsics(g.resize_intrinsics(intrinsics, ZOOM, ZOOM), -boxes[..., 0], -boxes[..., 1])


@pytest.mark.parametrize("solver", ["robust", "linear"])
@pytest.mark.parametrize("center", ["mean", "intersection"])
def test_cameras_come_back_from_the_rays_that_they_gave(solver, center):
    batch = toy_views(depth_size=16)
    found = cameras_from_ray_map(
        ray_targets(view_cameras(batch), batch.depth).rays, batch.crop_boxes, batch.source_sizes, None, solver, center
    )
    scale = ray_targets(view_cameras(batch), batch.depth).scale
    # The world is the first camera's in PyTorch3D's axes: relative poses do not depend on that.
    got = g.to_first_camera(found.world_to_camera)
    want = g.to_first_camera(batch.world_to_camera)
    torch.testing.assert_close(got[..., :3], want[..., :3], atol=2e-4, rtol=0)
    torch.testing.assert_close(got[..., 3], want[..., 3] * scale[:, None, None], atol=5e-4, rtol=0)
    zoom = 420 / 56
    whole = g.crop_intrinsics(
        g.resize_intrinsics(batch.intrinsics, zoom, zoom), *(-batch.crop_boxes[..., k] for k in (0, 1))
    )
    torch.testing.assert_close(found.intrinsics, whole, atol=0.3, rtol=0)


def test_known_intrinsics_are_kept_and_the_released_solver_errs_with_the_principal_point():
    batch = toy_views(depth_size=16)
    zoom = 420 / 56
    whole = g.crop_intrinsics(
        g.resize_intrinsics(batch.intrinsics, zoom, zoom), *(-batch.crop_boxes[..., k] for k in (0, 1))
    )
    off_center = whole.clone()
    off_center[..., :2, 2] += 40
    crop = g.resize_intrinsics(
        g.crop_intrinsics(off_center, *(batch.crop_boxes[..., k] for k in (0, 1))), 1 / zoom, 1 / zoom
    )
    rays = ray_targets(view_cameras(batch, crop), batch.depth).rays
    found = {
        "known": cameras_from_ray_map(rays, batch.crop_boxes, batch.source_sizes, off_center),
        "robust": cameras_from_ray_map(rays, batch.crop_boxes, batch.source_sizes),
        "released": cameras_from_ray_map(rays, batch.crop_boxes, batch.source_sizes, solver="released"),
    }
    assert torch.allclose(found["known"].intrinsics, off_center, atol=1e-2)
    want = g.to_first_camera(batch.world_to_camera)[:, 1:, :, :3]
    # The first view is the world: its own error is in all relative rotations, so compare absolute ones.
    errors = {}
    for name, cameras in found.items():
        absolute = g.rotation_angle(cameras.world_to_camera[..., :3] @ found["known"].world_to_camera[..., :3].mT)
        errors[name] = float(absolute.max())
    relative = g.to_first_camera(found["known"].world_to_camera)[:, 1:, :, :3]
    torch.testing.assert_close(relative, want, atol=2e-4, rtol=0)
    assert errors["robust"] < 1e-3 < 0.03 < errors["released"]


def test_blurred_rays_do_not_turn_the_camera_by_an_implausible_principal_point():
    batch = toy_views(depth_size=16)
    rays = ray_targets(view_cameras(batch), batch.depth).rays
    origins, endpoints = g.decode_rays(rays)
    columns = torch.linspace(0.4, 1.6, 16)[:, None]  # far on one side, near on the other: a projective error
    warped = origins + (endpoints - origins) * torch.cat([columns.square(), columns, columns], dim=-1)
    blurred = g.encode_rays(origins, warped)
    boxes, sizes = batch.crop_boxes, batch.source_sizes
    got = cameras_from_ray_map(blurred, boxes, sizes)
    true = cameras_from_ray_map(rays, boxes, sizes).world_to_camera
    coords = g.patch_centers(g.crop_parameters(boxes, sizes), 16).float().flatten(-3, -2)
    plain = g.cameras_from_rays(origins.flatten(2, 3), warped.flatten(2, 3), coords)
    assert plain.intrinsics[..., :2, 2].abs().max() > 0.25
    turned = g.rotation_angle(got.world_to_camera[..., :3] @ true[..., :3].mT)
    flip = torch.diag(torch.tensor([-1.0, -1, 1]))
    plainly = g.rotation_angle(flip @ plain.world_to_camera[..., :3] @ true[..., :3].mT)
    assert turned.mean() < 0.7 * plainly.mean()
    assert ((got.intrinsics[..., :2, 2] - sizes.flip(-1) / 2).abs() < 61).all()


def test_a_view_without_finite_rays_costs_only_itself():
    batch = toy_views(depth_size=16)
    rays = ray_targets(view_cameras(batch), batch.depth).rays
    rays[0, 1] = float("nan")
    found = cameras_from_ray_map(rays, batch.crop_boxes, batch.source_sizes).world_to_camera
    assert found.isfinite().all((-1, -2)).tolist() == [[True, False, True], [True, True, True]]
    with pytest.raises(ValueError, match="solver: expected one of robust, linear, released, got 'best'"):
        cameras_from_ray_map(rays, batch.crop_boxes, batch.source_sizes, solver="best")


def test_targets_are_float32_under_autocast_and_put_the_first_camera_into_the_middle():
    batch = toy_views(depth_size=16)
    plain = ray_targets(view_cameras(batch), batch.depth)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ray_targets(view_cameras(batch), batch.depth).rays, plain.rays)
    origins, endpoints = g.decode_rays(plain.rays)
    assert origins[:, 0].abs().max() < 1e-5
    # The unit is the distance to the median taken in the data's axes; in the camera's it is nearly the same.
    assert torch.allclose(endpoints[:, 0].flatten(1, 2).median(dim=1).values.norm(dim=-1), torch.ones(2), atol=0.1)
    # Endpoints are the surface: the same points as the data's own camera model gives, in PyTorch3D's axes.
    coarse = g.resize_intrinsics(batch.intrinsics, 16 / 56, 16 / 56)
    own = g.unproject_depth(batch.depth, coarse)[:, 0] * torch.tensor([-1.0, -1, 1])
    torch.testing.assert_close(endpoints[:, 0], own * plain.scale[:, None, None, None], atol=2e-3, rtol=1e-3)


def test_wrong_sizes_and_arguments_say_what_was_expected(tmp_path):
    model = tiny_diffusionsfm()
    images, noisy, coords = noisy_inputs(model)
    with pytest.raises(ValueError, match=r"images: expected \[B, V, 3, 56, 56\], got \[2, 3, 3, 40, 56\]"):
        model.encode(images[..., :40, :])
    with pytest.raises(
        ValueError, match=r"sparse model expects \[B, V, 8, 4, 4\], got \[2, 3, 8, 3, 4\].*depth_size must be 4"
    ):
        model(images, noisy[..., :3, :], coords, torch.tensor([1]))
    with pytest.raises(ValueError, match="9 views in one call, but the model has positions for 8.*sample_rays"):
        model(*noisy_inputs(model, 1, 9), torch.tensor([1]))
    with pytest.raises(ValueError, match="no argument 'hidden_dim'; nearest: hidden_size"):
        build("diffusionsfm_dense", hidden_dim=4)
    with pytest.raises(ValueError, match=r"encoder_taps: expected two blocks of 0 … 1, got \[5, 11\]"):
        build("diffusionsfm_dense", **{**SIZES, "encoder_taps": (5, 11)})
    with pytest.raises(ValueError, match="noise_schedule: expected linear, cosine or scaled_linear, got 'sqrt'"):
        build("diffusionsfm_sparse", **SIZES, noise_schedule="sqrt")
    with pytest.raises(ValueError, match="no file was given"):
        load_images([])
    (tmp_path / "not.png").write_text("text")
    with pytest.raises(ValueError, match="not.png is no image that can be read"):
        load_images([tmp_path / "not.png"])


def test_a_model_with_another_shape_of_encoder_is_filled_by_the_released_names():
    names = {name for name, _ in fill_(build("diffusionsfm_dense", **SIZES)).named_parameters()}
    assert {"feature_extractor.model.blocks.1.attn.qkv.weight", "scratch.refinenet4.resConfUnit1.conv1.weight"} <= names
