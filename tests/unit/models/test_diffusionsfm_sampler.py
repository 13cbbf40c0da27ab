"""Sampling of rays: shortcuts change nothing, stopping early is a prefix, more views than fit, determinism."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from parity_tools import normal
from restrike.models.diffusionsfm import sample_rays
from restrike.models.diffusionsfm.sampler import unit_vectors
from tiny_diffusionsfm import tiny_diffusionsfm, toy_coords

NAMES = ("diffusionsfm_sparse", "diffusionsfm_dense")


@torch.no_grad()
def plain_ddim(model: nn.Module, images: Tensor, coords: Tensor, state: Tensor, steps: int) -> list[Tensor]:
    """The published loop: images encoded and times embedded at every step; all predictions."""
    kept, stride = model.noise_scheduler.alphas_cumprod.double(), model.noise_scheduler.max_timesteps // steps
    predictions = []
    for k in reversed(range(steps)):
        time = torch.full((len(images),), k * stride)
        clean = unit_vectors(model(images, state, coords, time))
        now, after = float(kept[k * stride]), float(kept[(k - 1) * stride]) if k else 1.0
        noise = (state.double() - math.sqrt(now) * clean) / math.sqrt(1 - now)
        variance = (1 - after) / (1 - now) * (1 - now / after)
        state = (math.sqrt(after) * clean + math.sqrt(max(0.0, 1 - after - variance)) * noise).float()
        predictions.append(clean)
    return [*predictions, state]


@pytest.mark.parametrize("name", NAMES)
def test_cached_features_and_tables_of_times_change_nothing(name):
    model, steps = tiny_diffusionsfm(name), 10
    images, coords = normal("images", 2, 3, 3, 56, 56), toy_coords(2, 3)
    noise = normal("start", 2, 3, 8, model.map_size, model.map_size)
    *predictions, state = plain_ddim(model, images, coords, noise, steps)
    samples = sample_rays(
        model, coords, images, num_steps=steps, num_calls=steps, noise=noise, keep_predictions=range(steps)
    )
    for call, want in enumerate(predictions):
        torch.testing.assert_close(samples.predictions[call], want, atol=1e-4, rtol=0)
    torch.testing.assert_close(samples.state, state, atol=1e-4, rtol=0)
    again = sample_rays(model, coords, features=model.encode(images), num_steps=steps, num_calls=steps, noise=noise)
    assert torch.equal(again.state, samples.state)


def test_stopping_early_is_a_prefix_and_the_default():
    model, coords, images = tiny_diffusionsfm(), toy_coords(1, 3), normal("images", 1, 3, 3, 56, 56)
    whole = sample_rays(model, coords, images, num_calls=100, keep_predictions=(10,), keep_states=(11,))
    short = sample_rays(model, coords, images)
    assert torch.equal(short.prediction, whole.predictions[10]) and torch.equal(short.state, whole.states[11])
    assert not torch.equal(whole.prediction, short.prediction)
    calls = []
    model.ray_predictor.register_forward_hook(lambda *_: calls.append(1))
    model.ray_predictor.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    sample_rays(model, coords, images)
    assert len(calls) == 11


def test_the_first_step_forgets_the_noise():
    model, coords, images = tiny_diffusionsfm(), toy_coords(1, 2), normal("images", 1, 2, 3, 56, 56)
    samples = sample_rays(model, coords, images, num_calls=1)
    scale = samples.state / samples.prediction
    assert torch.allclose(scale, scale.new_full((), math.sqrt(1.289e-6)).expand_as(scale), rtol=1e-3)


def test_a_scene_has_one_answer_whatever_its_batch():
    model, coords, images = tiny_diffusionsfm(), toy_coords(3, 2), normal("images", 3, 2, 3, 56, 56)
    together = sample_rays(model, coords, images).prediction
    alone = sample_rays(model, coords[1:2], images[1:2]).prediction
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    torch.manual_seed(7)
    assert torch.equal(sample_rays(model, coords, images).prediction, together)
    other = sample_rays(model, coords, images, generator=torch.Generator().manual_seed(1)).prediction
    assert not torch.equal(other, together)


@pytest.mark.parametrize(("views", "limit"), [(6, 3), (7, 3), (4, 3), (5, 4)])
def test_runs_of_many_views_share_the_first_one(views, limit):
    model, coords = tiny_diffusionsfm(max_num_images=limit), toy_coords(2, views)
    images, noise = normal("images", 2, views, 3, 56, 56), normal("start", 2, views, 8, 4, 4)
    got = sample_rays(model, coords, images, noise=noise, num_calls=1).prediction
    order = torch.randperm(views - 1, generator=torch.Generator().manual_seed(0)) + 1
    want, first = torch.zeros_like(noise), []
    with torch.no_grad():
        for part in order.split(limit - 1):
            index = torch.cat([torch.zeros(1, dtype=torch.long), part])
            raw = model(images[:, index], noise[:, index], coords[:, index], torch.tensor([99]))
            want[:, part] = raw[:, 1:]
            first.append(raw[:, 0])
    want[:, 0] = torch.stack(first).mean(0)
    torch.testing.assert_close(got, unit_vectors(want), atol=1e-5, rtol=0)


def test_noise_can_be_put_back():
    model, coords, images = tiny_diffusionsfm(), toy_coords(1, 2), normal("images", 1, 2, 3, 56, 56)
    results = [
        sample_rays(model, coords, images, num_calls=5, eta=eta).state for eta in ((1.0, 0.0), (0.0, 0.0), (1.0, 1.0))
    ]
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_counts_out_of_range_and_nothing_to_sample_from_are_refused():
    model, coords = tiny_diffusionsfm(), toy_coords(1, 2)
    images = normal("images", 1, 2, 3, 56, 56)
    with pytest.raises(ValueError, match="needs images, or the features"):
        sample_rays(model, coords)
    with pytest.raises(ValueError, match="num_calls: expected 1 … 10 .num_steps., got 11"):
        sample_rays(model, coords, images, num_steps=10, num_calls=11)
    with pytest.raises(ValueError, match="num_steps: expected 1 … 100"):
        sample_rays(model, coords, images, num_steps=101)
