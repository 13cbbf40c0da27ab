"""Parameter groups and optimisers by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from restrike.optim import clip_gradients, create_optimizer, param_groups


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_groups_are_no_decay_first_then_decay():
    no_decay, decay = param_groups(net(), 0.05)
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0.0, 0.05)
    assert {p.ndim for p in no_decay["params"]} == {1} and len(no_decay["params"]) == 4
    assert {p.ndim for p in decay["params"]} == {2} and len(decay["params"]) == 2


def test_a_models_own_exceptions_do_not_decay():
    model = net()
    model.no_weight_decay = lambda: {"2.weight"}
    no_decay, decay = param_groups(model, 0.05)
    assert any(p is model[2].weight for p in no_decay["params"])
    assert len(decay["params"]) == 1


def test_optimizer_takes_its_arguments():
    lamb = create_optimizer("lamb", param_groups(net(), 0.12), lr=0.005, betas=(0.8, 0.99), eps=1e-8)
    assert type(lamb).__name__ == "Lamb" and lamb.defaults["max_grad_norm"] == 1.0
    for group in lamb.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.005, (0.8, 0.99), 1e-8)
    sgd = create_optimizer("sgd", param_groups(net(), 0.1), lr=0.1, momentum=0.7, nesterov=False)
    assert sgd.param_groups[0]["momentum"] == 0.7 and not sgd.param_groups[0]["nesterov"]


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("adamww", {}, "did you mean 'adamw'"),
        ("sgd", {"betas": (0.9, 0.99)}, "takes no betas"),
        ("adamw", {"momentun": 0.9}, "refused its arguments.*momentun"),
    ],
)
def test_bad_optimizers_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(name, param_groups(net(), 0.1), lr=0.1, **arguments)


@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_clipping_equals_torch_and_returns_the_norm(max_norm):
    ours, theirs = net(), net()
    for model in (ours, theirs):
        model(torch.ones(2, 3)).square().sum().backward()
    norm = clip_gradients(ours.parameters(), max_norm)
    assert norm == torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_norm_of_no_gradients_is_none():
    assert clip_gradients(net().parameters(), 1.0) is None
