"""Groups by weight decay, by layer and by glob."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from restrike.optim import create_optimizer, param_groups, scale_weight_decay


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    return timm.create_model("test_vit", num_classes=3, img_size=32)


def summary(groups: list[dict]) -> list[tuple[str, int, float, float]]:
    return [(g["name"], len(g["params"]), g["weight_decay"], g.get("lr_scale", 1.0)) for g in groups]


def test_globs_come_after_the_rest_in_the_given_order_and_the_first_match_counts(vit):
    factors = {"head.*": 10.0, "blocks.5.*": 0.5, "blocks.*": 0.1}
    assert summary(param_groups(vit, 0.05, factors)) == [
        ("no_decay", 5, 0.0, 1.0),
        ("decay", 1, 0.05, 1.0),
        ("head/no_decay", 1, 0.0, 10.0),
        ("head/decay", 1, 0.05, 10.0),
        ("blocks.5/no_decay", 8, 0.0, 0.5),
        ("blocks.5/decay", 4, 0.05, 0.5),
        ("blocks/no_decay", 40, 0.0, 0.1),
        ("blocks/decay", 20, 0.05, 0.1),
    ]


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
@pytest.mark.parametrize("layer_decay", [0.7, 1.0])
def test_rates_fall_from_the_head_to_the_input(vit, layer_decay, weight_decay):
    groups = param_groups(vit, weight_decay, {"head.*": 3.0}, layer_decay)
    names = [g["name"] for g in groups]
    assert names[:2] == ["layer_00_no_decay", "layer_00_decay"]
    assert names[-2:] == ["head/layer_07_no_decay", "head/layer_07_decay"]
    assert len(set(names)) == len(names) == 16
    scales = {g["name"]: g["lr_scale"] for g in groups}
    assert scales["layer_00_decay"] == pytest.approx(layer_decay**7)
    assert scales["layer_06_no_decay"] == pytest.approx(layer_decay)
    assert scales["head/layer_07_decay"] == pytest.approx(3.0)
    assert {g["weight_decay"] for g in groups if g["name"].endswith("_no_decay")} == {0.0}
    assert {g["weight_decay"] for g in groups if not g["name"].endswith("_no_decay")} == {weight_decay}


@pytest.mark.parametrize("arguments", [{}, {"lr_factors": {"*.bias": 2.0, "blocks.*": 0.1}}, {"layer_decay": 0.5}])
def test_every_parameter_is_in_exactly_one_group(vit, arguments):
    ids = [id(p) for group in param_groups(vit, 0.1, **arguments) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in vit.parameters())


def test_factors_multiply_the_learning_rate(vit):
    optimizer = create_optimizer("adamw", param_groups(vit, 0.05, {"head.*": 1e4}), lr=1e-6)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-6, 1e-6, 1e-2, 1e-2])
    assert all("lr_scale" not in group for group in optimizer.param_groups)


def test_a_glob_without_a_match_names_near_ones(vit):
    with pytest.raises(ValueError, match=r"no parameter matches 'heads\.\*'. Near: .*head\.weight"):
        param_groups(vit, 0.05, {"heads.*": 2.0})
    with pytest.raises(ValueError, match="layer_decay"):
        param_groups(vit, 0.05, layer_decay=1.5)


def test_the_normalized_rule_divides_by_the_root_of_the_steps():
    assert scale_weight_decay("constant", 0.05, 400) == 0.05
    assert scale_weight_decay("normalized", 0.05, 400) == pytest.approx(0.05 / math.sqrt(400))
    with pytest.raises(ValueError, match="at least 1"):
        scale_weight_decay("normalized", 0.05, 0)
    with pytest.raises(ValueError, match="constant, normalized"):
        scale_weight_decay("sqrt", 0.05, 10)


def test_all_parameters_decay_where_asked(vit):
    groups = param_groups(vit, 0.05, {"head.*": 10.0}, decay_all=True)
    assert {group["weight_decay"] for group in groups} == {0.05}
    assert sum(len(group["params"]) for group in groups) == len(list(vit.parameters()))
