"""Cached positional terms are never stale."""

import copy
import pickle

import pytest
import torch

from restrike.models.fastervit import position_cache
from tiny_models import random_images, tiny_fastervit

NAME = "levels.2.blocks.1.hat_attn.pos_emb_funct.cpb_mlp.2.weight"
IMAGES = random_images(1, 3, 128, 128)


@pytest.fixture
def model():
    """With its cache filled."""
    model = tiny_fastervit().eval()
    logits(model)
    assert all(level.position_cache._terms for level in model.levels[2:])
    return model


@torch.no_grad()
def logits(model):
    return model(IMAGES)


def fresh_logits(model):
    """Of a copy, whose cache is empty."""
    return logits(copy.deepcopy(model))


def write_data(model):
    model.get_parameter(NAME).data.mul_(2)


def replace_data(model):
    model.get_parameter(NAME).data = model.get_parameter(NAME).data * 2


def replace_parameter(model):
    owner = model.get_submodule(NAME.rpartition(".")[0])
    owner.weight = torch.nn.Parameter(owner.weight.detach() * 2)


def optimiser_step(model):
    model(IMAGES).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def fused_average(model):
    other = [p * 2 for p in model.parameters()]
    with torch.no_grad():
        torch._foreach_lerp_(list(model.parameters()), other, 0.5)


def write_through_state_dict(model):
    model.state_dict()[NAME].mul_(2)


def load(model):
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


def load_assigning(model):
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)


def write_in_inference_mode(model):
    with torch.inference_mode():
        model.get_parameter(NAME).mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        write_data,
        replace_data,
        replace_parameter,
        optimiser_step,
        fused_average,
        write_through_state_dict,
        load,
        load_assigning,
        write_in_inference_mode,
    ],
)
def test_every_way_to_change_a_weight_shows(model, change):
    before = logits(model)
    change(model)
    after = logits(model)
    assert torch.equal(after, fresh_logits(model))
    assert not torch.equal(after, before)


def test_many_changes_in_a_row_show(model):
    for _ in range(20):  # an allocator gives an old address to new weights
        replace_data(model)
        assert torch.equal(logits(model), fresh_logits(model))


def test_terms_are_computed_once_while_weights_stay(model, monkeypatch):
    monkeypatch.setattr(type(model.levels[2]), "_compute_positions", lambda *_: pytest.fail("computed again"))
    logits(model)
    with torch.inference_mode():
        model(IMAGES)


def test_training_and_gradients_bypass_the_cache(model):
    model(IMAGES).sum().backward()
    assert model.get_parameter(NAME).grad.abs().sum() > 0
    model.train()(IMAGES.repeat(2, 1, 1, 1)).sum().backward()


def test_precision_of_autocast_is_part_of_the_key(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = logits(model)
        assert torch.equal(mixed, fresh_logits(model))
    assert torch.equal(logits(model), fresh_logits(model))
    assert torch.equal(logits(model.double().float()), fresh_logits(model))


def test_copies_start_empty_and_do_not_follow_each_other(model):
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(level.position_cache._terms for level in twin.levels[2:])
        before = logits(twin)
        write_data(model)
        assert torch.equal(logits(twin), before)


def test_a_model_made_in_inference_mode_works_uncached():
    with torch.inference_mode():
        model = tiny_fastervit().eval()
        logits(model)
        model.get_parameter(NAME).mul_(2)
        assert torch.equal(model(IMAGES), tiny_with_doubled_weight()(IMAGES))


def tiny_with_doubled_weight():
    model = tiny_fastervit().eval()
    with torch.no_grad():
        model.get_parameter(NAME).mul_(2)
    return model


def test_functional_call_uses_the_weights_it_is_given(model):
    weights = {NAME: model.get_parameter(NAME).detach() * 2}
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(model, weights, IMAGES), tiny_with_doubled_weight()(IMAGES))
    assert torch.equal(logits(model), fresh_logits(model))


def test_several_sizes_are_kept_up_to_a_bound():
    model = tiny_fastervit("faster_vit_3_any_res").eval()
    for side in range(96, 480, 64):
        with torch.no_grad():
            model(random_images(1, 3, side, 128))
    assert len(model.levels[2].position_cache._terms) == position_cache._MAX_GRIDS


def test_large_terms_are_not_kept(monkeypatch):
    monkeypatch.setattr(position_cache, "_LIMIT_BYTES", 1000)
    model = tiny_fastervit().eval()
    logits(model)
    assert not any(level.position_cache._terms for level in model.levels[2:])
