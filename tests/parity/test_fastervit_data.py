"""The recorded mixing and evaluation transform of FasterViT's training (timm 0.9.6)."""

from __future__ import annotations

import io
import json

import numpy as np
import torch
from PIL import Image

from parity_tools import image, load_case, relative_error
from restrike.data.erasing import normalize
from restrike.data.mixing import Mixing
from restrike.data.transforms import EvalTransform

TOLERANCE = 1e-6  # of the reference's README: no arithmetic that could differ


class LegacyStream:
    """The stream that the case was recorded with, behind a Generator's names."""

    def __init__(self, seed: int) -> None:
        stream = np.random.RandomState(seed)
        self.random, self.beta, self.integers = stream.rand, stream.beta, stream.randint


def test_mixup_and_cutmix_equal_the_recorded_batches() -> None:
    meta, recorded = load_case("fastervit", "mixup_cutmix_batch")
    options = meta["constructor"]
    assert options.pop("mode") == "batch"
    mixing = Mixing(**options)
    rng = LegacyStream(8)
    calls = json.loads(meta["mode"].removeprefix("per call: "))
    batches = []
    for call, labels in enumerate(recorded_call["labels"] for recorded_call in calls):
        images = torch.stack([(image(f"fv.mix.{call}.{i}", 3, 32, 32) * 255).round() for i in range(8)])
        batches.append(mixing(images.to(torch.uint8), torch.tensor(labels), rng))  # type: ignore[arg-type]
    assert relative_error(torch.stack([mixed for mixed, _ in batches]), recorded["images"]) <= TOLERANCE
    assert relative_error(torch.stack([targets for _, targets in batches]), recorded["targets"]) <= TOLERANCE


def test_evaluation_transform_equals_the_recorded_tensor() -> None:
    _, recorded = load_case("fastervit", "eval_transform_224_0875")
    pixels = (image("fv.prep", 3, 300, 400) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
    transformed = EvalTransform(224, crop_pct=0.875)(stream.getvalue())
    normalized = normalize(transformed[None], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[0]
    assert relative_error(normalized, recorded["x"]) <= TOLERANCE
