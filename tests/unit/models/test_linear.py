import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from restrike.models.layers import linear as module
from restrike.models.layers.linear import Linear, linear, linear_gelu
from restrike.models.layers.mlp import Mlp

TOLERANCE = 1e-5  # two kernels, float32


@pytest.fixture
def onednn(monkeypatch):
    """The second kernel, whatever this machine would choose."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(module, "prefers_onednn", lambda: True)
    monkeypatch.setattr(module, "_SMALL", 0)


def operands(*lead):
    generator = torch.Generator().manual_seed(0)
    shapes = ((*lead, 6), (5, 6), (5,))
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def close(a, b):
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("lead", [(3,), (2, 3), (2, 3, 4), (1, 1), (0, 3)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_equal_the_plain_linear(onednn, lead, has_bias):
    tensors = operands(*lead) if has_bias else operands(*lead)[:2]
    ours, plain = linear(*tensors), F.linear(*tensors)
    direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    assert close(ours, plain)
    for a, b in zip(*(torch.autograd.grad(out, tensors, direction) for out in (ours, plain)), strict=True):
        assert a.shape == b.shape and close(a, b)


def test_the_other_kernel_really_runs(onednn, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_kernel", lambda x, w, b, activation: calls.append(activation) or F.linear(x, w, b))
    x, weight, bias = operands(3)
    linear(x, weight, bias).sum().backward()
    with torch.no_grad():
        linear_gelu(x, weight, bias)
    assert calls == ["none", "none", "none", "gelu"]  # forward, two gradients, and the fused form


def test_small_products_are_left_to_pytorch_in_training(onednn, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_kernel", lambda x, w, b, activation: calls.append(len(x)) or F.linear(x, w, b))
    x, weight, bias = operands(3)
    monkeypatch.setattr(module, "_SMALL", 2 * 3 * 6 * 5 + 1)
    linear(x, weight, bias)
    assert not calls
    linear(x.repeat(2, 1), weight, bias)
    with torch.no_grad():
        linear(x, weight, bias)  # no gradient, no way through Python
    assert calls == [6, 3]


def test_gradients_of_gradients(onednn):
    tensors = operands(3)

    def curvature(function):
        (first,) = torch.autograd.grad(function(*tensors).square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), tensors[1])[0]

    assert close(curvature(linear), curvature(F.linear))


def test_function_transforms(onednn):
    x, weight, bias = (t.detach() for t in operands(4, 3))
    assert close(torch.func.vmap(lambda row: linear(row, weight, bias))(x), F.linear(x, weight, bias))
    gradient = torch.func.grad(lambda w: linear(x, w, bias).square().sum())(weight)
    assert close(gradient, torch.func.grad(lambda w: F.linear(x, w, bias).square().sum())(weight))


def test_fused_gelu_is_the_exact_one(onednn):
    x, weight, bias = (t.detach() * 3 for t in operands(4, 3))
    with torch.no_grad():
        assert close(linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias)))


def test_autocast_and_other_precisions_keep_their_meaning(onednn):
    layer = Linear(6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 6)).dtype == torch.bfloat16
    assert copy.deepcopy(layer).double()(torch.randn(3, 6, dtype=torch.float64)).dtype == torch.float64
    assert layer(torch.randn(6)).shape == (5,)


def test_floating_point_operations_are_counted_all_the_same(onednn):
    with FlopCounterMode(display=False) as counter:
        Linear(6, 5)(torch.randn(3, 6)).sum().backward()
    plain = torch.nn.Linear(6, 5)
    with FlopCounterMode(display=False) as expected:
        plain(torch.randn(3, 6)).sum().backward()
    assert counter.get_total_flops() == expected.get_total_flops() > 0


def test_the_choice_is_made_from_the_machine_alone():
    assert module.prefers_onednn() is module.prefers_onednn()
    assert isinstance(module.prefers_onednn(), bool)


def test_mlp_is_two_linears_around_gelu(onednn):
    mlp, x = Mlp(6, 12), torch.randn(2, 3, 6)
    expected = F.linear(F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)
    assert close(mlp(x), expected)
    with torch.no_grad():
        assert close(mlp(x), expected)
    assert list(mlp.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.expand(4, 3, 6),
        lambda t: t.repeat(1, 2)[:, ::2],
        lambda t: t.repeat(2, 1)[1:4],
        lambda t: t.t().contiguous().t(),
    ],
    ids=["expanded", "strided", "offset", "transposed"],
)
def test_any_memory_layout(onednn, view):
    x, weight, bias = operands(3)
    ours, plain = linear(view(x), weight, bias), F.linear(view(x), weight, bias)
    assert close(ours, plain)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), [x, weight]) for out in (ours, plain)), strict=True):
        assert close(a, b)
