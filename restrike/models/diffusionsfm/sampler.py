"""DDIM sampling of rays (arXiv 2010.02502, as DiffusionSfM, arXiv 2505.05473, uses it).

Unusual: the variance of the stochastic part is taken away, but no noise is put in its place (η = (1, 0)). The first
step starts at ᾱ = 0, so its result is the first prediction alone. The answer is known early: the evaluation reads the
prediction of the eleventh of 100 calls, so sampling stops there unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from restrike.models.diffusionsfm.model import RAY_CHANNELS, DiffusionSfM, ImageFeatures, TimeTable

NUM_STEPS = 100
EARLY_CALLS = 11  # of 100: the published evaluation reads the eleventh prediction


class RaySamples(NamedTuple):
    """Maps [B, V, 8, P, P].

    Attributes:
        prediction: x₀ as the last call saw it, 4-vectors of unit length: what the published evaluation scores.
        state: The sampler's state after the last call: what the published demo shows.
        predictions: Those of the calls that were asked for, by their number from 0.
        states: The state after so many calls, likewise.
    """

    prediction: Tensor
    state: Tensor
    predictions: dict[int, Tensor]
    states: dict[int, Tensor]


@torch.no_grad()
def sample_rays(
    model: DiffusionSfM,
    coords: Tensor,
    images: Tensor | None = None,
    features: ImageFeatures | None = None,
    *,
    num_steps: int = NUM_STEPS,
    num_calls: int | None = None,
    noise: Tensor | None = None,
    eta: tuple[float, float] = (1.0, 0.0),
    views_per_call: int | None = None,
    generator: torch.Generator | None = None,
    keep_predictions: Collection[int] = (),
    keep_states: Collection[int] = (),
) -> RaySamples:
    """Rays of scenes.

    Args:
        model: In eval mode.
        coords: [B, V, 2, h, w], from `ndc_coordinates`.
        images: [B, V, 3, H, W], normalised; or
        features: what `model.encode` made of them.
        num_steps: Times that the whole trajectory visits.
        num_calls: Stop after so many of them; None: 11 of 100 in proportion. The release's `stop_iteration` is
            num_steps - num_calls + 1.
        noise: [B or 1, V, 8, P, P], the start; None draws one for all scenes, so that none depends on its batch.
        eta: Share of the stochastic variance that is taken away, and of the noise that is added.
        views_per_call: Split more views than this into runs with the first view in each, shuffled anew at every step;
            None: the model's `max_num_images`.
        generator: On the CPU; None: seed 0, so that a scene has one answer.
        keep_predictions: Numbers of calls whose predictions are wanted.
        keep_states: Counts of calls whose states are wanted.

    Raises:
        ValueError: neither images nor features, or counts out of range.
    """
    features = _features(model, images, features)
    times = model.noise_scheduler.inference_timesteps(num_steps)
    calls = max(1, round(EARLY_CALLS / NUM_STEPS * num_steps)) if num_calls is None else num_calls
    if not 1 <= calls <= num_steps:
        raise ValueError(f"num_calls: expected 1 … {num_steps} (num_steps), got {calls}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batch, views = coords.shape[:2]
    shape = (batch, views, RAY_CHANNELS, model.map_size, model.map_size)
    if noise is None:
        noise = torch.randn(1, *shape[1:], generator=generator)
    state = noise.to(device=coords.device, dtype=torch.float32).expand(shape)
    table = model.time_table(torch.tensor(times[:calls], device=coords.device))
    kept = [*model.noise_scheduler.alphas_cumprod[times].tolist(), 1.0]
    limit = views_per_call or model.max_num_images
    predictions, states = {}, {}
    for call in range(calls):
        raw = _predict(model, features, state, coords, table.row(call), limit, generator)
        prediction = unit_vectors(raw.float())
        state = _step(state, prediction, kept[call], kept[call + 1], eta, generator)
        if call in keep_predictions:
            predictions[call] = prediction
        if call + 1 in keep_states:
            states[call + 1] = state
    return RaySamples(prediction, state, predictions, states)


def unit_vectors(rays: Tensor) -> Tensor:
    """Each 4-vector of maps [..., 8, P, P] divided by its length."""
    return F.normalize(rays.unflatten(-3, (2, 4)), dim=-3).flatten(-4, -3)


def _features(model: DiffusionSfM, images: Tensor | None, features: ImageFeatures | None) -> ImageFeatures:
    if features is not None:
        return features
    if images is None:
        raise ValueError("sample_rays needs images, or the features that model.encode made of them")
    return model.encode(images)


def _step(
    state: Tensor,
    prediction: Tensor,
    kept: float,
    kept_next: float,
    eta: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """x_τ' from x_τ and the predicted x₀; `kept` is ᾱ at the two times. Coefficients in float64."""
    variance = (1 - kept_next) / (1 - kept) * (1 - kept / kept_next)
    spread = math.sqrt(max(0.0, 1 - kept_next - eta[0] * variance)) / math.sqrt(1 - kept)
    moved = (math.sqrt(kept_next) - spread * math.sqrt(kept)) * prediction + spread * state
    if not eta[1]:
        return moved
    noise = torch.randn(state.shape, generator=generator).to(state)
    return moved + eta[1] * math.sqrt(variance) * noise


def _predict(
    model: DiffusionSfM,
    features: ImageFeatures,
    state: Tensor,
    coords: Tensor,
    time: TimeTable,
    limit: int,
    generator: torch.Generator,
) -> Tensor:
    """One prediction of all views; where they are too many, from runs that share the first view.

    The first view's answer is the mean over the runs. Runs of equal length go through the network as one batch.
    """
    batch, views = state.shape[:2]
    if views <= limit:
        return model.denoise(features, state, coords, time)
    order = torch.randperm(views - 1, generator=generator) + 1
    runs = [torch.cat([order.new_zeros(1), part]) for part in order.split(limit - 1)]
    whole = [run for run in runs if len(run) == limit]
    groups = [torch.stack(whole)] + ([runs[-1][None]] if len(runs) > len(whole) else []) if whole else [runs[0][None]]
    result, first = torch.empty_like(state), []
    for group in groups:
        index = group.flatten().to(state.device)
        count, length = group.shape

        def fold(x: Tensor, index: Tensor = index, length: int = length) -> Tensor:
            return x[:, index].unflatten(1, (-1, length)).flatten(0, 1)

        part = ImageFeatures(fold(features.patches), tuple(fold(skip) for skip in features.skips))
        predicted = model.denoise(part, fold(state), fold(coords), time).unflatten(0, (batch, count))
        first.append(predicted[:, :, 0])
        result[:, group[:, 1:].flatten().to(state.device)] = predicted[:, :, 1:].flatten(1, 2).to(result)
    result[:, 0] = torch.cat(first, dim=1).mean(1).to(result)
    return result
