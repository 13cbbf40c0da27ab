"""Derived buffers keep their names and shapes everywhere and cost nothing."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn

from restrike.models import build
from restrike.models.fastervit.positions import RelativeBias, TokenEmbedding
from restrike.models.layers.derived import derived_buffer_names, exclude_derived_from_ddp, placeholder
from tiny_models import SIZES, random_images, tiny_fastervit

# Windows of 32x32 and 16x16: 8 heads x 1024^2 pairs, 34 MB for a bias if it were stored.
LARGE = {"name": "faster_vit_4_21k_512", "window_size": (7, 7, 32, 16), "num_heads": (1, 1, 8, 8), "resolution": 512}
BIAS = "levels.2.blocks.0.attn.pos_emb_funct.relative_bias"
INDEX = "levels.2.blocks.0.attn.pos_emb_funct.relative_position_index"


@pytest.fixture
def large():
    return tiny_fastervit(**LARGE, depths=(1, 1, 2, 1))


def stored_bytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_large_tables_have_shapes_but_no_storage(large):
    state = large.state_dict()
    assert state[BIAS].shape == (1, 8, 1024, 1024)
    assert stored_bytes([state[name] for name in derived_buffer_names(large) if name.endswith("bias")]) < 1 << 20


def test_blocks_share_one_index(large):
    state = large.state_dict()
    other = state[INDEX.replace("blocks.0", "blocks.1")]
    assert other is not state[INDEX] and other.data_ptr() == state[INDEX].data_ptr()
    assert {INDEX, INDEX.replace("blocks.0", "blocks.1")} <= {name for name, _ in large.named_buffers()}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta"),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.share_memory(),
    ],
    ids="half bfloat16 meta to_empty channels_last deepcopy pickle share_memory".split(),
)
def test_every_way_to_move_a_model_keeps_them_small_and_true(large, change):
    before = large.state_dict()
    after = change(large).state_dict()
    assert [(n, t.shape) for n, t in after.items()] == [(n, t.shape) for n, t in before.items()]
    assert stored_bytes([after[name] for name in derived_buffer_names(large) if name.endswith("bias")]) < 1 << 20
    if not after[INDEX].is_meta:
        assert torch.equal(after[INDEX], before[INDEX])


def test_a_saved_state_dict_is_no_larger_than_its_weights(large):
    file = io.BytesIO()
    torch.save(large.state_dict(), file)
    weights = stored_bytes(large.parameters())
    assert file.tell() < weights + stored_bytes([large.state_dict()[INDEX]]) * 1.2 + (1 << 20)


def test_precision_lost_on_the_way_is_found_again():
    function = RelativeBias(side=5, num_heads=2, num_tokens=25)
    table = function.relative_coords_table.clone()
    assert torch.equal(function.half().float().relative_coords_table, table)


def test_building_on_the_meta_device_then_assigning_weights():
    real = tiny_fastervit().eval()
    with torch.device("meta"):
        empty = build("faster_vit_3_224", **SIZES)
    empty.load_state_dict(real.state_dict(), assign=True)
    images = random_images(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(empty.eval()(images), real(images))


def test_loading_accepts_any_derived_values_of_any_shape_or_none():
    model = tiny_fastervit()
    names = set(derived_buffer_names(model))
    state = model.state_dict()
    model.load_state_dict({n: t for n, t in state.items() if n not in names}, strict=True)
    model.load_state_dict({n: torch.full((3, 1), 7.0) if n in names else t for n, t in state.items()}, strict=True)
    assert torch.equal(model.state_dict()[INDEX], state[INDEX])


def test_a_model_made_in_inference_mode_leaves_no_inference_tensor_for_later_ones():
    with torch.inference_mode():
        first = RelativeBias(side=9, num_heads=1, num_tokens=81)
    second = RelativeBias(side=9, num_heads=1, num_tokens=81)
    second().sum().backward()
    assert first.relative_position_index.data_ptr() == second.relative_position_index.data_ptr()


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_data_parallel_training_leaves_them_alone(one_rank, large):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = large

        def forward(self, x):
            return self.net(x)

    wrapper = Wrapper()
    exclude_derived_from_ddp(wrapper)
    images = random_images(1, 3, 512, 512)
    for module in (large, wrapper):
        parallel = nn.parallel.DistributedDataParallel(module)
        for _ in range(2):  # buffers are broadcast from the second forward on
            parallel(images).sum().backward()
    del large._ddp_params_and_buffers_to_ignore
    with pytest.raises(RuntimeError, match="single memory location"):
        nn.parallel.DistributedDataParallel(large)


def test_tools_that_write_to_every_buffer_work_at_ordinary_sizes():
    model = tiny_fastervit()
    average = ModelEmaV3(model, decay=0.5)
    model(random_images(2, 3, 128, 128)).sum().backward()
    average.update(model)
    assert torch.equal(average.module.state_dict()[INDEX], model.state_dict()[INDEX])


def test_true_values_for_published_files():
    torch.manual_seed(0)
    function, embedding = RelativeBias(3, num_heads=2, num_tokens=13), TokenEmbedding(6, num_tokens=9)
    values = function.derived_values()
    assert values.keys() == function.derived_buffers == set(function._buffers)
    assert {n: v.shape for n, v in values.items()} == {n: b.shape for n, b in function._buffers.items()}
    bias = values["relative_bias"]
    assert (bias[..., :4, :] == 0).all() and (bias[..., :, :4] == 0).all() and (bias[..., 4:, 4:] > 0).all()
    assert torch.equal(embedding.derived_values()["relative_bias"], embedding())


def test_placeholder_is_a_view_of_one_element_only_when_large():
    assert placeholder(4, 4).untyped_storage().nbytes() == 64
    assert placeholder(1024, 1024).untyped_storage().nbytes() == 4
    assert not placeholder(1024, 1024).any()
