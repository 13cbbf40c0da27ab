"""Mixup and CutMix against timm, their targets, and their errors. Recorded numbers are in tests/parity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data.mixup import FastCollateMixup
from torch import Tensor

from restrike.data.mixing import Mixing, smooth_one_hot

NUM_CLASSES = 10


class LegacyStream:
    """numpy's global legacy stream, which timm draws from, behind a Generator's names."""

    random, beta, integers = staticmethod(np.random.rand), staticmethod(np.random.beta), staticmethod(np.random.randint)


def batch(seed: int, size: int = 6, height: int = 23, width: int = 17) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (size, 3, height, width), dtype=np.uint8))
    return images, torch.from_numpy(rng.integers(0, NUM_CLASSES, size))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup_alpha": 0.0},
        {"cutmix_alpha": 0.0},
        {"prob": 0.4, "switch_prob": 0.8, "label_smoothing": 0.0},
    ],
)
def test_mixing_equals_timms(options: dict[str, float]) -> None:
    ours = Mixing(NUM_CLASSES, **options, box_rule="timm_1.x")  # type: ignore[arg-type]
    arguments = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1, **options}
    theirs = FastCollateMixup(num_classes=NUM_CLASSES, **arguments)  # type: ignore[arg-type]
    for seed in range(25):
        images, labels = batch(seed)
        np.random.seed(seed)
        wanted, wanted_targets = theirs([(i.numpy(), int(y)) for i, y in zip(images, labels, strict=True)])
        np.random.seed(seed)
        mixed, targets = ours(images.clone(), labels, LegacyStream)  # type: ignore[arg-type]
        # Equal but for ties of rounding, which cv2's fused multiply-add may break the other way.
        difference = (mixed.int() - wanted.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
        torch.testing.assert_close(targets, wanted_targets, rtol=0, atol=1e-6)


def test_the_two_box_rules_differ_by_one_pixel_for_odd_sides() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        share, seed = float(rng.random()), int(rng.integers(1 << 30))
        sides = []
        for rule in ("timm_0.9.6", "timm_1.x"):
            side = Mixing(2, box_rule=rule)._box_side(31, share, np.random.default_rng(seed))  # type: ignore[arg-type]
            sides.append((side.start, side.stop))
        is_odd = int(31 * np.sqrt(1 - share)) % 2
        (start, stop), (new_start, new_stop) = sides
        assert start == new_start and new_stop == min(stop + is_odd, 31) and 0 <= start <= stop


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_layout_does_not_matter_and_is_kept(layout: torch.memory_format) -> None:
    for seed in range(8):
        images, labels = batch(seed)
        wanted, _ = Mixing(NUM_CLASSES)(images.clone(), labels, np.random.default_rng(seed))
        mixed, _ = Mixing(NUM_CLASSES)(images.clone(memory_format=layout), labels, np.random.default_rng(seed))
        assert torch.equal(mixed, wanted) and mixed.is_contiguous(memory_format=layout)


def test_partners_are_each_others_mirror() -> None:
    images, labels = batch(0)
    images[:3], images[3:] = 0, 200
    mixed, targets = Mixing(NUM_CLASSES, cutmix_alpha=0)(images, labels, np.random.default_rng(3))
    low, high = int(mixed[0, 0, 0, 0]), int(mixed[-1, 0, 0, 0])
    assert low + high == 200 and torch.equal(mixed.unique().sort().values, torch.tensor(sorted({low, high})).byte())
    one_hot = torch.nn.functional.one_hot(labels, NUM_CLASSES).float()
    share = high / 200
    expected = 0.01 + 0.9 * (share * one_hot + (1 - share) * one_hot.flip(0))
    torch.testing.assert_close(targets, expected, atol=3e-3, rtol=0)


def test_cutmix_targets_follow_the_clipped_box() -> None:
    for seed in range(30):
        images, labels = batch(0)
        images[:3], images[3:] = 0, 255
        labels = torch.tensor([0, 0, 0, 1, 1, 1])
        mixed, targets = Mixing(2, mixup_alpha=0, label_smoothing=0)(images, labels, np.random.default_rng(seed))
        pasted = (mixed[0] == 255).float().mean()
        torch.testing.assert_close(targets[0], torch.stack([1 - pasted, pasted]))


def test_targets_are_distributions() -> None:
    for seed in range(20):
        _, targets = Mixing(NUM_CLASSES)(*batch(seed), np.random.default_rng(seed))
        assert targets.dtype == torch.float32 and targets.shape == (6, NUM_CLASSES)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))


@pytest.mark.parametrize("options", [{"prob": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}])
def test_switched_off_it_only_smooths_and_takes_odd_batches(options: dict[str, float]) -> None:
    images, labels = batch(0, size=5)
    mixed, targets = Mixing(NUM_CLASSES, **options)(images.clone(), labels, np.random.default_rng(0))  # type: ignore[arg-type]
    assert torch.equal(mixed, images)
    assert torch.equal(targets, smooth_one_hot(labels, NUM_CLASSES, 0.1))
    assert targets[0, labels[0]] == pytest.approx(0.91) and targets.min() == pytest.approx(0.01)


def test_an_odd_batch_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ValueError, match="batch_size_per_device: .*even number, got 5"):
        Mixing(NUM_CLASSES)(*batch(0, size=5), np.random.default_rng(0))


@pytest.mark.parametrize("label", [-1, NUM_CLASSES])
def test_a_label_out_of_range_is_an_error(label: int) -> None:
    images, labels = batch(0)
    labels[2] = label
    with pytest.raises(ValueError, match=f"labels .*{label}.* num_classes = 10"):
        Mixing(NUM_CLASSES)(images, labels, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("option", "value"), [("num_classes", 0), ("prob", 1.5), ("mixup_alpha", -1.0), ("box_rule", "timm_2")]
)
def test_wrong_options_are_errors_that_name_them(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        Mixing(**{"num_classes": 3, option: value})  # type: ignore[arg-type]
