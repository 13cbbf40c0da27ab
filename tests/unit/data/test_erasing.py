"""Normalisation on the device, and random erasing against timm's."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from restrike.data.erasing import normalize, random_erase, sample_boxes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes_of(images: Tensor) -> np.ndarray:
    """[N, 4] top, left, height, width of what is no longer zero."""
    found = []
    for image in images.numpy():
        rows, columns = np.nonzero(image[0])
        if len(rows):
            found.append((rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1))
    return np.array(found)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalisation_is_the_textbook_formula(dtype: torch.dtype, layout: torch.memory_format) -> None:
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=generator())
    images = images.contiguous(memory_format=layout)
    wanted = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    normalized = normalize(images, list(MEAN), list(STD), dtype)
    assert normalized.dtype == dtype and normalized.is_contiguous(memory_format=layout)
    torch.testing.assert_close(normalized.float(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_constants_made_in_inference_mode_serve_training_too() -> None:
    images, mean = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), (0.1, 0.2, 0.3)  # a mean that no other test uses
    with torch.inference_mode():  # Lightning's sanity check comes first
        before = normalize(images, mean, STD)
    weight = torch.ones((), requires_grad=True)
    (normalize(images, mean, STD) * weight).sum().backward()
    assert float(weight.grad) == pytest.approx(float(before.sum()))


def test_erased_boxes_are_distributed_as_timms() -> None:
    shape = (4000, 3, 24, 32)
    random.seed(0), torch.manual_seed(0)
    theirs = boxes_of(RandomErasing(0.25, mode="pixel", device="cpu")(torch.zeros(shape)))
    ours = boxes_of(random_erase(torch.zeros(shape), probability=0.25, generator=generator()))
    assert len(ours) == pytest.approx(1000, abs=85) and len(theirs) == pytest.approx(1000, abs=85)
    for column, side in zip(range(4), (24, 32, 24, 32), strict=True):
        for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
            pair = [np.quantile(boxes[:, column], quantile) for boxes in (ours, theirs)]
            assert pair[0] == pytest.approx(pair[1], abs=0.06 * side)
    areas = ours[:, 2] * ours[:, 3] / (24 * 32)
    assert areas.min() >= 0.01 and areas.max() <= 0.36  # rounding of the sides included
    assert np.median(areas) == pytest.approx(np.median(theirs[:, 2] * theirs[:, 3] / (24 * 32)), abs=0.02)


def test_noise_is_standard_normal_for_every_pixel_and_channel() -> None:
    erased = random_erase(torch.zeros(400, 3, 32, 32), probability=1, generator=generator())
    noise = erased[erased != 0]
    assert float(noise.mean()) == pytest.approx(0, abs=0.01) and float(noise.std()) == pytest.approx(1, abs=0.01)
    assert (erased[:, 0][erased[:, 0] != 0] != erased[:, 1][erased[:, 0] != 0]).all()


def test_what_lies_outside_the_boxes_is_untouched() -> None:
    images = torch.randn(50, 3, 16, 16, generator=generator(1))
    boxes = sample_boxes(images.shape, 0.5, AREA, ASPECT, generator())
    erased = random_erase(images.clone(), probability=0.5, generator=generator())
    changed = torch.zeros(50, 16, 16, dtype=torch.bool)
    for index, top, left, height, width in boxes:
        changed[index, top : top + height, left : left + width] = True
    assert torch.equal((erased != images).all(1), changed) and 10 < len(boxes) < 40


def test_boxes_always_fit_and_impossible_ones_are_left_out() -> None:
    for seed in range(20):
        for _, top, left, height, width in sample_boxes((64, 3, 9, 40), 1.0, AREA, ASPECT, generator(seed)):
            assert 0 <= top <= top + height <= 9 and 0 <= left <= left + width <= 40
    assert sample_boxes((8, 3, 9, 40), 1.0, (2.0, 2.0), (1.0, 1.0), generator()) == []


@pytest.mark.parametrize(("probability", "count"), [(0.0, 0), (1.0, 64)])
def test_probability_is_exact_at_its_ends(probability: float, count: int) -> None:
    assert len(sample_boxes((64, 3, 32, 32), probability, AREA, ASPECT, generator())) == count


def test_the_result_is_a_function_of_the_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second, other = (
        random_erase(torch.zeros(16, 3, 32, 32), probability=0.5, generator=generator(seed)) for seed in (7, 7, 8)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_channels_last_work(dtype: torch.dtype) -> None:
    images = torch.zeros(8, 3, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
    erased = random_erase(images, probability=1, generator=generator())
    assert erased.is_contiguous(memory_format=torch.channels_last) and bool((erased != 0).any())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_boxes_on_a_gpu_are_those_of_the_cpu() -> None:
    shape = (64, 3, 32, 32)
    on_cpu = random_erase(torch.zeros(shape), probability=0.5, generator=generator())
    on_gpu = random_erase(torch.zeros(shape, device="cuda"), probability=0.5, generator=generator())
    assert torch.equal(on_cpu != 0, (on_gpu != 0).cpu())
