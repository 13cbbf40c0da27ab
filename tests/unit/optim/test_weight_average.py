"""The weight average against timm's, and with buffers that need no averaging."""

from __future__ import annotations

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from restrike.optim import WeightAverage, averaged_names


class Shared(nn.Module):
    """One convolution under two names, and a buffer that parameters determine."""

    derived_buffers = frozenset({"table"})

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.alias = self.first
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.zeros(()).expand(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.first(x))


def train_a_little(net: nn.Module, step: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    net.train()(x).sin().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_forty_updates_are_bit_equal_to_timm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    ours, theirs = WeightAverage(net, 0.97), ModelEmaV3(net, 0.97)
    for step in range(40):
        train_a_little(net, step)
        ours.update()
        theirs.update(net)
    for name, tensor in theirs.module.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert not torch.equal(ours.module[0].weight, net[0].weight)


def test_a_tensor_with_two_names_moves_twice_as_in_the_release():
    torch.manual_seed(0)
    net = Shared()
    average = WeightAverage(net, 0.9)
    start = net.first.weight.detach().clone()
    with torch.no_grad():
        net.first.weight.add_(1.0)
        net.norm.weight.add_(1.0)
    average.update()
    torch.testing.assert_close(average.module.first.weight, start + (1 - 0.9**2))
    torch.testing.assert_close(average.module.norm.weight, torch.full((3,), 1.1))


def test_derived_buffers_are_neither_averaged_nor_saved():
    net = Shared()
    average = WeightAverage(net, 0.9)
    average.update()  # writing to `table` in place would raise
    assert "table" not in averaged_names(net) and "table" not in average.state_dict()
    assert "alias.weight" in average.state_dict()


def test_the_copy_is_a_teacher():
    average = WeightAverage(Shared().train(), 0.9)
    assert not average.module.training
    assert not any(p.requires_grad for p in average.module.parameters())


def test_state_round_trip_and_restart():
    net = Shared()
    first = WeightAverage(net, 0.9)
    train_a_little(net, 0)
    first.update()
    second = WeightAverage(Shared(), 0.9)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in first.state_dict().items())
    first.restart()
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in first.state_dict().items())


def test_a_state_of_another_network_is_refused_by_name():
    average = WeightAverage(nn.Linear(2, 2), 0.9)
    with pytest.raises(ValueError, match=r"first \['weight'\]"):
        average.load_state_dict({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        WeightAverage(nn.Linear(2, 2), 1.5)
