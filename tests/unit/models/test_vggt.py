"""What VGGT promises beside its numbers: symmetry, memory options that change nothing, precision, clear errors."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tools import fill_, image, normal
from restrike.checkpoints import CheckpointError, load_released
from restrike.models import build, list_models
from restrike.models.layers.dinov2 import DinoVisionTransformer
from tiny_vggt import CAMERA_DEPTH, SIZES, tiny_vggt

CLOSE = 1e-5  # float32, after four blocks and a decoder


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_vggt(enable_track=False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return image("vggt-unit", 2, 3, 3, 28, 42)


def predict(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        predictions = model(images)
    del predictions["pose_enc_list"]
    return predictions


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_views_other_than_the_first_are_interchangeable(model, images):
    plain = predict(model, images)
    swapped = {name: x[:, [0, 2, 1]] for name, x in predict(model, images[:, [0, 2, 1]]).items()}
    assert largest_difference(plain, swapped) < CLOSE
    other_first = {name: x[:, [1, 0, 2]] for name, x in predict(model, images[:, [1, 0, 2]]).items()}
    assert largest_difference(plain, other_first) > 1e-3


def test_scenes_of_a_batch_do_not_see_each_other(model, images):
    both, alone = predict(model, images), predict(model, images[1:])
    assert largest_difference({name: x[1:] for name, x in both.items()}, alone) < CLOSE


def test_one_scene_and_one_view_need_no_batch_dimension(model, images):
    alone = predict(model, images[0, :1])
    assert alone["depth"].shape == (1, 1, 28, 42, 1)
    assert alone["world_points"].shape == (1, 1, 28, 42, 3)
    assert alone["pose_enc"].shape == (1, 1, 9)


def test_only_layers_that_heads_read_are_kept_and_they_are_the_same(model, images):
    with torch.no_grad():
        everything, some = model.aggregator(images), model.aggregator(images, {1, 3})
    assert list(everything) == [0, 1, 2, 3]
    assert list(some) == [1, 3]
    assert all(torch.equal(x, everything[i]) for i, x in some.items())


def test_layers_behind_the_last_one_that_is_read_are_not_run(images):
    model = tiny_vggt(enable_camera=False, enable_track=False, taps=(0, 0, 1, 1))
    ran = []
    for i, block in enumerate(model.aggregator.global_blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    predict_without_cameras = model(images)
    assert ran == [0, 1]
    assert "pose_enc" not in predict_without_cameras


def test_frames_in_chunks_give_the_same_maps(model, images):
    whole = predict(model, images)
    for head in (model.depth_head, model.point_head):
        head.frames_per_chunk = 4
    chunked = predict(model, images)
    for head in (model.depth_head, model.point_head):
        head.frames_per_chunk = 8
    assert largest_difference(whole, chunked) < CLOSE


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """What a training forward keeps for its backward pass."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        predictions = model(images)
        predictions["depth"].sum().backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for address, size in storages.items() if address not in weights)


def test_checkpointing_keeps_less_and_only_in_training(images):
    model = tiny_vggt(**CAMERA_DEPTH).train()
    plain = saved_bytes(model, images)
    model.set_grad_checkpointing()
    assert saved_bytes(model, images) < plain / 3
    model.eval()
    assert saved_bytes(model, images) > plain / 2


class Operations(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frames_per_chunk", [2, 8])
def test_selective_checkpointing_runs_no_product_twice_and_changes_no_number(images, frames_per_chunk):
    gradients, counts = [], []
    for mode in (False, "selective"):
        model = tiny_vggt(**CAMERA_DEPTH, frames_per_chunk=frames_per_chunk, grad_checkpointing=mode).train()
        with Operations() as operations:
            predictions = model(images)
            (predictions["depth"].sum() + predictions["pose_enc"].sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        counts.append(operations.counts)
    assert torch.equal(*gradients)
    kept, selective = counts
    products = ("mm", "addmm", "bmm", "convolution", "_linear_pointwise", "_scaled_dot_product_flash_attention_for_cpu")
    assert {name: selective[name] for name in products} == {name: kept[name] for name in products}
    assert sum(kept[name] for name in products) > 50
    assert selective["native_layer_norm"] > 1.5 * kept["native_layer_norm"]


def test_an_unknown_kind_of_checkpointing_is_refused():
    with pytest.raises(ValueError, match="expected true, false or 'selective', got 'some'"):
        tiny_vggt(grad_checkpointing="some")


def test_a_frozen_aggregator_keeps_nothing(images):
    model = tiny_vggt(**CAMERA_DEPTH).train()
    model.aggregator.requires_grad_(False).eval()
    tokens = model.aggregator(images)
    assert all(not x.requires_grad for x in tokens.values())


def test_heads_stay_in_float32_under_autocast(model, images):
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.dtype}))
        for name, module in model.named_modules()
        if name in ("aggregator.global_blocks.1", "aggregator.global_blocks.1.attn.qkv", "depth_head.projects.0")
        or name == "camera_head.trunk.0.attn.qkv"
    ]
    with torch.autocast("cpu", torch.bfloat16):
        got = predict(model, images)
    for hook in hooks:
        hook.remove()
    assert seen == {
        "aggregator.global_blocks.1": torch.float32,  # the residual stream
        "aggregator.global_blocks.1.attn.qkv": torch.bfloat16,
        "depth_head.projects.0": torch.float32,
        "camera_head.trunk.0.attn.qkv": torch.float32,
    }
    want = predict(model, images)
    assert 0 < largest_difference(got, want) < 0.2


def test_tracks_are_predicted_where_points_are_asked_for():
    model = tiny_vggt(enable_point=False, enable_camera=False, enable_depth=False).train()
    images, queries = image("vggt-track", 1, 2, 3, 42, 42), torch.tensor([[5.0, 6.0], [20.5, 30.0]])
    predictions = model(images, queries)
    assert predictions["track"].shape == (1, 2, 2, 2)
    assert torch.equal(predictions["track"][:, 0], queries[None])
    assert torch.equal(predictions["vis"], predictions["vis_logits"].sigmoid())
    assert len(predictions["track_list"]) == 4
    with pytest.raises(ValueError, match="needs query_points"):
        model(images)
    sum(x.sum() for x in predictions["track_list"]).backward()
    assert model.track_head.tracker.updateformer.virual_tracks.grad.abs().sum() > 0


def test_a_round_of_the_tracker_is_taught_by_its_own_result_alone():
    model = tiny_vggt(enable_point=False, enable_camera=False, enable_depth=False).train()
    predictions = model(image("vggt-track", 1, 2, 3, 42, 42), torch.tensor([[5.0, 6.0], [20.5, 30.0]]))
    bias = model.track_head.tracker.updateformer.flow_head.bias
    (gradient,) = torch.autograd.grad(predictions["track"][..., 0].sum(), bias)
    # Two tracks in one view that can move, two image pixels a pixel of the map; the first coordinate's bias, once.
    assert float(gradient[0]) == pytest.approx(2 * 1 * 2)


def test_too_small_images_for_the_correlation_levels_are_refused():
    model = tiny_vggt(track_levels=6)
    with pytest.raises(
        ValueError, match="6 correlation levels need feature maps of at least 32 pixels a side, got 14x21"
    ):
        model(image("x", 1, 2, 3, 28, 42), torch.zeros(1, 1, 2))


def test_a_copy_and_a_model_compiled_without_graph_breaks_compute_the_same(images):
    model = tiny_vggt(**CAMERA_DEPTH, depth=1, taps=(0, 0, 0, 0), patch_embed_depth=1, camera_depth=1)
    want = predict(model, images)
    assert largest_difference(predict(copy.deepcopy(model), images), want) == 0
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert largest_difference(predict(compiled, images), want) < CLOSE


@torch.no_grad()
def test_a_model_in_bfloat16_runs_and_keeps_places_in_float32(images):
    model, queries = tiny_vggt().bfloat16(), torch.tensor([[5.0, 6.0], [20.5, 27.25]]).expand(2, 2, 2)
    predictions = model(images.bfloat16(), queries)
    assert predictions["depth"].dtype == torch.bfloat16
    assert torch.equal(predictions["track"][:, 0], queries)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny_vggt()(images, queries)["track"][:, 0], queries)


@torch.no_grad()
def test_shapes_can_be_had_without_memory():
    with torch.device("meta"):
        model, images = build("vggt_1b"), torch.empty(1, 3, 3, 336, 518)
        predictions = model.eval()(images, torch.empty(1, 7, 2))
    assert predictions["world_points"].shape == (1, 3, 336, 518, 3)
    assert predictions["track"].shape == (1, 3, 7, 2)


def test_a_whole_file_fits_the_fine_tuning_build_but_for_the_heads_that_it_lacks(tmp_path):
    whole, small = tiny_vggt(), tiny_vggt(**CAMERA_DEPTH)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    torch.save({"model": whole.state_dict()}, tmp_path / "model.pt")
    report = load_released(small, tmp_path / "model.pt")  # strict: nothing else may be left over
    assert not report.missing
    assert {name.split(".")[0] for name in report.unexpected} == {"point_head", "track_head"}
    own = whole.state_dict()
    assert all(torch.equal(x, own[name]) for name, x in small.state_dict().items())
    torch.save({"model": small.state_dict()}, tmp_path / "small.pt")
    with pytest.raises(CheckpointError, match="only in the model: point_head"):
        load_released(whole, tmp_path / "small.pt")


def test_a_dinov2_file_fits_the_embedder(tmp_path):
    model = tiny_vggt(**CAMERA_DEPTH)
    released = fill_(DinoVisionTransformer(70, 14, 96, 2, 4), rename="other.{}".format)
    torch.save(released.state_dict(), tmp_path / "dino.pth")
    assert load_released(model.aggregator.patch_embed, tmp_path / "dino.pth") == ([], [])
    assert torch.equal(model.aggregator.patch_embed.pos_embed, released.pos_embed)


def test_a_new_model_starts_as_published():
    torch.manual_seed(0)
    model = build("vggt_1b", **SIZES)
    state = model.state_dict()
    assert not state["camera_head.empty_pose_tokens"].any()
    assert torch.all(state["aggregator.frame_blocks.0.ls1.gamma"] == 0.01)
    assert torch.all(state["aggregator.patch_embed.blocks.0.ls1.gamma"] == 1)
    dino = state["aggregator.patch_embed.blocks.0.mlp.fc1.weight"]
    ours = state["aggregator.frame_blocks.0.mlp.fc1.weight"]
    assert float(dino.std()) == pytest.approx(0.02, rel=0.05)
    assert float(ours.std()) == pytest.approx(96**-0.5 / 3**0.5, rel=0.05)  # PyTorch's own
    assert float(state["aggregator.camera_token"].abs().max()) < 1e-5
    assert float(state["track_head.tracker.updateformer.flow_head.weight"].std()) == pytest.approx(0.001, rel=0.1)
    assert not model.aggregator.patch_embed.mask_token.requires_grad


def test_the_first_round_of_an_untrained_camera_head_is_finite_for_any_number_of_views(model):
    for views in (1, 5):
        assert predict(model, normal("any", 1, views, 3, 14, 14).sigmoid())["pose_enc"].isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tap": (0,)}, "vggt_1b has no argument 'tap'; nearest: taps"),
        ({"taps": (0, 1, 2, 9)}, r"taps: expected four layers of 0 … 3, got \[0, 1, 2, 9\]"),
        ({"dpt_out_channels": (8, 8)}, "dpt_out_channels: expected four widths"),
        ({"patch_embed": "vit"}, "patch_embed: expected one of conv, dinov2_vits14_reg"),
        ({"patch_embed_depth": None}, "has width 1024, embed_dim is 96"),
        ({"num_heads": 5}, "num_heads must divide the width, got 5 heads for width 96"),
        ({"enable_depth": False, "enable_camera": False, **CAMERA_DEPTH}, "the model has no head"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        build("vggt_1b", **{**SIZES, **overrides})


def test_images_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="multiples of 14, got 30x42; crop or resize them, for instance to 28x42"):
        model(torch.zeros(1, 2, 3, 30, 42))
    with pytest.raises(ValueError, match=r"expected \[B, V, 3, H, W\] or \[V, 3, H, W\], got \[3, 28, 42\]"):
        model(torch.zeros(3, 28, 42))


def test_names_of_the_family():
    assert list_models("vggt") == ["vggt_1b", "vggt_1b_camera_depth"]
