"""CUT3R beyond the recorded cases: streams, masks, sizes, gradients, start weights."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from parity_tools import fill_, image, normal
from restrike.checkpoints import load_released
from restrike.checkpoints.safe_io import CheckpointError
from restrike.checkpoints.start import load_dust3r, load_with_fresh_parts
from restrike.models import build, list_models
from restrike.models.cut3r import CUT3R, Predictions, Stream
from restrike.models.cut3r.inputs import draw_inputs
from tiny_cut3r import SIZES, tiny_cut3r

SMALL_DPT = {"dpt_features": 16, "dpt_out_channels": (8, 8, 16, 16)}


def pictures(seed: str, views: int, size: tuple[int, int] = (32, 48), batch: int = 2) -> torch.Tensor:
    return 2 * image(seed, batch, views, 3, *size) - 1


def same(a: Predictions, b: Predictions) -> bool:
    """Up to rounding; activations are exponentials, so it is relative."""
    return all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def net() -> CUT3R:
    torch.manual_seed(0)
    return build("cut3r_224_linear", **SIZES).eval()


def test_both_released_models_are_listed():
    assert list_models("cut3r") == ["cut3r_224_linear", "cut3r_512_dpt"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["cut3r_224_linear", "cut3r_512_dpt"])
@pytest.mark.parametrize("size", [(16, 16), (32, 80), (80, 48)])
def test_any_size_and_number_of_views(name, size):
    model = build(name, **SIZES, **(SMALL_DPT if "dpt" in name else {})).eval()
    out = model(pictures("size", 3, size))
    assert out.points_world.shape == out.points_camera.shape == out.colors.shape == (2, 3, *size, 3)
    assert out.confidence_world.shape == (2, 3, *size) and bool((out.confidence_camera >= 1).all())
    assert torch.allclose(out.poses[..., 3:].norm(dim=-1), torch.ones(2, 3)) and bool((out.poses[..., 3] >= 0).all())
    assert same(Predictions(*(x[:, :1] for x in out)), model(pictures("size", 3, size)[:, :1]))


@torch.no_grad()
def test_a_stream_says_what_the_whole_sequence_says(net):
    images, stream = pictures("stream", 5), Stream(net, batch=2)
    whole = net(images)
    steps = [stream.step(images[:, i]) for i in range(5)]
    assert same(whole, Predictions(*(torch.stack(x, dim=1) for x in zip(*steps, strict=True))))
    stream.reset()
    few = [stream.steps(images[:, start:stop]) for start, stop in ((0, 2), (2, 5))]
    assert same(whole, Predictions(*(torch.cat(x, dim=1) for x in zip(*few, strict=True))))
    stream.reset()
    assert same(steps[0], stream.step(images[:, 0]))


@torch.no_grad()
def test_a_query_by_rays_changes_nothing_and_needs_a_scene(net):
    images, rays, stream = pictures("query", 2), normal("rays", 2, 32, 48, 6), Stream(net, batch=2)
    with pytest.raises(ValueError, match="first view"):
        stream.query(rays)
    stream.step(images[:, 0])
    before = stream.carry
    seen = stream.query(rays)
    assert torch.equal(stream.carry.state, before.state) and torch.equal(stream.carry.memory, before.memory)
    assert not same(seen, stream.query(rays + 1))
    released = Stream(net, batch=2, masked_tokens=False)
    released.step(images[:, 0])
    assert not same(seen, released.query(rays))  # training saw the masked image token in the image's place


@torch.no_grad()
def test_a_stream_may_show_one_scene_an_image_and_ask_another_by_rays(net):
    """The released stream has one rule for the whole batch, and crashes on such a one."""
    images, rays = pictures("mixed", 2), normal("rays", 2, 2, 32, 48, 6)
    has_image = torch.tensor([[True, True], [True, False]])
    fair = build("cut3r_224_linear", **SIZES, masked_ray_scope="scene").eval()
    fair.load_state_dict(net.state_dict())
    mixed, alone = Stream(fair, batch=2).steps(images, rays, has_image, ~has_image), Stream(fair)
    alone.step(images[:1, 0])
    assert same(alone.step(images[:1, 1]), Predictions(*(x[:1, 1] for x in mixed)))
    with pytest.raises(ValueError, match="first view"):
        Stream(fair, batch=2).steps(images, rays, ~has_image, has_image)


@torch.no_grad()
def test_ray_queries_in_a_stream_see_the_tokens_of_training():
    model, images, rays = tiny_cut3r(), pictures("train", 2), normal("rays", 2, 2, 32, 48, 6)
    mask = torch.tensor([[True, False]] * 2)
    # In training the first view has no ray map, so a mask token of rays is added to it; take that away to compare.
    model.masked_ray_map_token.zero_()
    whole = model(images, rays, image_mask=mask, ray_mask=~mask)
    stream = Stream(model, batch=2)
    stream.step(images[:, 0])
    assert same(Predictions(*(x[:, 1] for x in whole)), stream.query(rays[:, 1]))


@torch.no_grad()
def test_the_state_does_not_see_views_without_image_nor_those_that_may_not_update(net):
    images, rays = pictures("mask", 3), normal("rays", 2, 3, 32, 48, 6)
    only_rays = torch.tensor([[True, False, True]] * 2)
    silent = torch.tensor([[True, False, True]] * 2)

    def carry(count: int, **masks):
        return net.rollout(net.encode(images, **masks).views(0, count), net.start(2))[1]

    for masks in ({"ray_maps": rays, "image_mask": only_rays, "ray_mask": ~only_rays}, {"update": silent}):
        assert torch.equal(carry(1, **masks).state, carry(2, **masks).state)
        assert not torch.equal(carry(2, **masks).state, carry(3, **masks).state)


@torch.no_grad()
def test_a_view_with_neither_image_nor_rays_is_predicted_from_the_state_alone(net):
    images, mask = pictures("absent", 3), torch.tensor([[True, False, True], [True, True, True]])
    other = images.clone()
    other[0, 1] = 0
    one, two = net(images, image_mask=mask), net(other, image_mask=mask)
    assert same(one, two)
    assert not same(one, net(images))
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    assert same(net(images), net(images, image_mask=everywhere, reset=~everywhere, update=everywhere))


@torch.no_grad()
def test_a_reset_gives_the_next_view_the_state_of_the_start(net):
    encoded = net.encode(pictures("reset", 2), reset=torch.tensor([[False, True], [False, False]]))
    _, carry = net.rollout(encoded, net.start(2))
    assert torch.equal(carry.state[0], net.start(2).state[0])
    assert torch.equal(carry.memory[0], net.start(2).memory[0])
    assert not torch.equal(carry.state[1], net.start(2).state[1])
    assert not carry.is_start  # the view after a reset asks the memory for its pose token


def test_views_that_the_heads_see_in_chunks_give_the_same_numbers_and_gradients():
    images = pictures("chunks", 3)
    gradients = []
    for arguments in ({"frames_per_chunk": 64}, {"frames_per_chunk": 2}, {"grad_checkpointing": True}):
        torch.manual_seed(0)
        model = build("cut3r_512_dpt", **SIZES, **SMALL_DPT, **arguments).train()
        model(images).points_world.mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        assert all(torch.allclose(x, other[n], atol=1e-5, rtol=1e-3) for n, x in gradients[0].items())


def test_parameters_that_a_step_does_not_use_get_zero_gradients_as_in_the_release():
    model = build("cut3r_224_linear", **SIZES).train()
    sum(x.mean() for x in model(pictures("grad", 2))).backward()
    named = dict(model.named_parameters())
    unused = [n for n in named if "ray_map" in n or n == "masked_img_token"]
    unused += [f"pose_retriever.write_blocks.{i}.cross_attn.proj{x}.weight" for i in range(2) for x in "qk"]
    assert all(named[n].grad is not None and not named[n].grad.any() for n in unused)
    assert [n for n, p in named.items() if p.grad is None] == []


def test_with_a_frozen_encoder_nothing_of_it_has_a_gradient():
    model = build("cut3r_224_linear", **SIZES).train()
    for n, p in model.named_parameters():
        p.requires_grad_(not n.startswith(("enc_", "patch_embed", "masked")))
    tokens = model.encode(pictures("frozen", 2)).tokens
    assert not tokens.requires_grad


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"head_type": "mlp"}, "head_type: expected linear or dpt"),
        ({"state_pe": "3d"}, "state_pe"),
        ({"masked_ray_scope": "view"}, "masked_ray_scope: expected batch or scene"),
        ({"dec_depth": 1}, "dec_depth"),
        ({"enc_num_heads": 7}, "128 does not fit enc_num_heads = 7"),
        ({"enc_embed_dim": 96}, "ray encoder's heads = 16"),
        ({"enc_dim": 3}, "nearest: enc_"),
        ({"head_type": "dpt", "patch_size": 8}, "16 pixels a patch"),
        ({"dpt_out_channels": (1, 2)}, "four widths"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build("cut3r_224_linear", **{**SIZES, **arguments})


@pytest.mark.parametrize(
    "images, rays, message",
    [
        (None, None, "got neither"),
        (torch.zeros(1, 2, 3, 30, 32), None, "multiples of 16"),
        (torch.zeros(1, 3, 32, 32), None, r"\[B, V, 3, H, W\]"),
        (torch.zeros(1, 2, 3, 32, 32), torch.zeros(1, 2, 32, 32, 5), "ray_maps"),
        (torch.zeros(1, 2, 3, 32, 32), torch.zeros(1, 1, 32, 32, 6), "expected one"),
    ],
)
def test_inputs_of_other_shapes_are_refused(net, images, rays, message):
    with pytest.raises(ValueError, match=message):
        net.encode(images, rays)


def test_inputs_of_metric_scenes_are_a_function_of_the_seed():
    cameras, intrinsics = torch.eye(3, 4).expand(50, 8, 3, 4), torch.eye(3).expand(50, 8, 3, 3)
    one, two, other = (draw_inputs(cameras, intrinsics, (16, 16), seed) for seed in (1, 1, 2))
    assert torch.equal(one.ray_mask, two.ray_mask) and not torch.equal(one.ray_mask, other.ray_mask)
    assert bool(one.image_mask[:, 0].all()) and not bool(one.ray_mask[:, 0].any())
    assert bool((one.image_mask | one.ray_mask).all())
    shares = [(one.image_mask & ~one.ray_mask), (one.ray_mask & ~one.image_mask), (one.image_mask & one.ray_mask)]
    for share, want in zip(shares, (0.8, 0.15, 0.05), strict=True):
        assert float(share[:, 1:].float().mean()) == pytest.approx(want, abs=0.06)


def test_scenes_of_a_part_of_a_batch_have_the_draws_that_they_have_in_the_whole():
    cameras, intrinsics = torch.eye(3, 4).expand(7, 5, 3, 4), torch.eye(3).expand(7, 5, 3, 3)
    whole = draw_inputs(cameras, intrinsics, (16, 16), 3)
    parts = [draw_inputs(cameras[rows], intrinsics[rows], (16, 16), 3, first_scene=rows.start) for rows in
             (slice(0, 3), slice(3, 7))]  # fmt: skip
    for joined, want in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(joined), want)
    assert not torch.equal(whole.ray_mask[:3], whole.ray_mask[3:6])


# Start weights


def zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_a_released_file_with_its_settings_loads_strictly_and_saves_again_unchanged(tmp_path):
    model = fill_(build("cut3r_512_dpt", **SIZES, **SMALL_DPT))
    settings = OmegaConf.create({"model": "ARCroco3DStereo(…)", "lr": 1e-6, "list": [1, {"a": None}], "same": "${lr}"})
    released = {"args": settings, "model": {f"module.{n}": p for n, p in model.state_dict().items()}, "epoch": 9}
    torch.save(released, tmp_path / "cut3r.pth")
    again = zeroed(build("cut3r_512_dpt", **SIZES, **SMALL_DPT))
    assert load_released(again, tmp_path / "cut3r.pth") == ([], [])
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in model.state_dict().items())
    assert list(again.state_dict()) == list(model.state_dict())


def dust3r_state(model: nn.Module) -> dict[str, torch.Tensor]:
    shared = ("patch_embed.", "enc_blocks.", "enc_norm.", "decoder_embed.", "dec_blocks.", "dec_norm.")
    state = {n: normal(n, *p.shape) for n, p in model.state_dict().items() if n.startswith(shared)}
    more = {n.replace("dec_blocks", "dec_blocks2"): p for n, p in state.items() if n.startswith("dec_blocks.")}
    return {**state, **more, "mask_token": torch.zeros(1, 1, 4), "downstream_head1.proj.weight": torch.zeros(2, 2)}


def test_dust3r_starts_encoder_and_both_decoders(tmp_path):
    model = build("cut3r_224_linear", **SIZES)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = dust3r_state(model)
    torch.save({"model": state}, tmp_path / "dust3r.pth")
    names = load_dust3r(model, tmp_path / "dust3r.pth")
    now = model.state_dict()
    assert torch.equal(now["enc_norm.weight"], state["enc_norm.weight"])
    for decoder in ("dec_blocks", "dec_blocks_state"):
        assert torch.equal(now[f"{decoder}.1.mlp.fc1.weight"], state["dec_blocks.1.mlp.fc1.weight"])
    assert {n for n in now if not torch.equal(now[n], before[n])} == set(names)
    assert not any(n.startswith(("downstream_head", "pose_", "dec_norm_state", "decoder_embed_state")) for n in names)
    part = load_dust3r(model, tmp_path / "dust3r.pth", encoder_only=True)
    assert {n.split(".")[0] for n in part} == {"patch_embed", "enc_blocks"}


def test_a_file_that_is_no_dust3r_or_lacks_a_block_is_refused(tmp_path):
    model = build("cut3r_224_linear", **SIZES)
    cases = {"is no DUSt3R": model.state_dict(), "lacks enc_blocks.2": dust3r_state(model)}
    for name in [n for n in cases["lacks enc_blocks.2"] if n.startswith("enc_blocks.2.")]:
        del cases["lacks enc_blocks.2"][name]
    for message, state in cases.items():
        torch.save({"model": state}, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match=message):
            load_dust3r(model, tmp_path / "file.pth")


def test_another_head_starts_anew_and_everything_else_has_to_be_there(tmp_path):
    linear, dpt = fill_(build("cut3r_224_linear", **SIZES)), build("cut3r_512_dpt", **SIZES, **SMALL_DPT)
    torch.save(linear.state_dict(), tmp_path / "linear.pth")
    fresh = ["downstream_head.dpt_*", "downstream_head.*proj.*"]
    new = load_with_fresh_parts(dpt, tmp_path / "linear.pth", fresh)
    assert all(n.startswith("downstream_head.dpt_") for n in new)
    for n in ("downstream_head.pose_head.mlp.fc1.weight", "downstream_head.final_transform.1.norm2.mlp.1.bias"):
        assert torch.equal(dpt.state_dict()[n], linear.state_dict()[n])
    with pytest.raises(CheckpointError, match="only in the file: downstream_head.proj"):
        load_with_fresh_parts(dpt, tmp_path / "linear.pth", fresh[:1])
    with pytest.raises(CheckpointError, match="does not fit"):
        load_released(dpt, tmp_path / "linear.pth")
