"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) in timm's form, on arrays instead of Pillow images.

Differs from the paper as timm does: each drawn operation is applied with probability 0.5, its magnitude is drawn
from a normal distribution, and with `inc1` every operation grows stronger with the magnitude.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from restrike.data import affine, photometric

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
IMAGENET_MEAN_COLOR = (124, 116, 104)

_GRAMMAR = "rand[-m<magnitude 0-10>][-n<operations>][-p<probability>][-mstd<deviation>][-mmax<limit>][-inc<0|1>]"
_UNIFORM_FROM_STD = 100  # timm: a larger deviation asks for magnitudes uniform between 0 and m


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Draw `num_ops` operations with replacement and apply each with `probability`.

    Args:
        magnitude: mean strength, on a scale where 10 is timm's usual end.
        num_ops: operations drawn for a picture.
        probability: of applying a drawn operation.
        magnitude_std: standard deviation of the strength; infinite = uniform in [0, magnitude].
        magnitude_max: the strength is clipped to [0, this].
        increasing: whether Posterize, Solarize and the enhancers grow stronger with the magnitude.
        fill: colour of what a warp brings in from outside, usually the data set's mean.
        interpolation: of the warps; "random" draws bilinear or bicubic for each.
    """

    magnitude: float = 10.0
    num_ops: int = 2
    probability: float = 0.5
    magnitude_std: float = 0.0
    magnitude_max: float = 10.0
    increasing: bool = False
    fill: tuple[int, int, int] = IMAGENET_MEAN_COLOR
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"

    @classmethod
    def parse(
        cls,
        spec: str,
        fill: tuple[int, int, int] = IMAGENET_MEAN_COLOR,
        interpolation: Literal["random", "bilinear", "bicubic"] = "random",
    ) -> RandAugment:
        """Read timm's notation, such as `rand-m9-mstd0.5-inc1`.

        Raises:
            ValueError: anything else, timm's weighted sets (`t…`) included.
        """
        fields = {"m": "magnitude", "n": "num_ops", "p": "probability", "mstd": "magnitude_std",
                  "mmax": "magnitude_max", "inc": "increasing"}  # fmt: skip
        name, *sections = spec.split("-")
        values: dict[str, float] = {}
        for section in sections:
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?|inf)", section)
            if name != "rand" or match is None or match[1] not in fields:
                raise ValueError(f"rand_augment: cannot read {section!r} in {spec!r}; expected {_GRAMMAR}")
            values[fields[match[1]]] = float(match[2])
        if name != "rand":
            raise ValueError(f"rand_augment: only 'rand' policies are known, got {spec!r}; expected {_GRAMMAR}")
        std = values.pop("magnitude_std", 0.0)
        return cls(
            magnitude=values.get("magnitude", 10.0),
            num_ops=int(values.get("num_ops", 2)),
            probability=values.get("probability", 0.5),
            magnitude_std=math.inf if std > _UNIFORM_FROM_STD else std,
            magnitude_max=values.get("magnitude_max", 10.0),
            increasing=bool(values.get("increasing", 0)),
            fill=fill,
            interpolation=interpolation,
        )

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [H, W, 3] in and out; the input is not written to."""
        for index in rng.integers(len(OPERATIONS), size=self.num_ops):
            if rng.random() < self.probability:
                pixels = self._apply(OPERATIONS[index], pixels, self.draw_magnitude(rng), rng)
        return pixels

    def draw_magnitude(self, rng: np.random.Generator) -> float:
        """Strength of one operation, in [0, magnitude_max]."""
        magnitude = self.magnitude
        if math.isinf(self.magnitude_std):
            magnitude = rng.uniform(0, magnitude)
        elif self.magnitude_std > 0:
            magnitude = rng.normal(magnitude, self.magnitude_std)
        return min(max(magnitude, 0.0), self.magnitude_max)

    def _apply(self, name: str, pixels: np.ndarray, magnitude: float, rng: np.random.Generator) -> np.ndarray:
        if name == "AutoContrast":
            return photometric.auto_contrast(pixels)
        if name == "Equalize":
            return photometric.equalize(pixels)
        if name == "Invert":
            return photometric.invert(pixels)
        argument = operation_argument(name, magnitude, self.increasing, negate=rng.random() < 0.5)
        if name in _PHOTOMETRIC:
            return _PHOTOMETRIC[name](pixels, argument)
        interpolation = self.interpolation
        if interpolation == "random":
            interpolation = "bicubic" if rng.random() < 0.5 else "bilinear"
        return affine.warp(pixels, _matrix(name, argument, *pixels.shape[:2]), self.fill, interpolation)


_PHOTOMETRIC: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "Posterize": photometric.posterize,
    "Solarize": photometric.solarize,
    "SolarizeAdd": photometric.solarize_add,
    "Color": photometric.color,
    "Contrast": photometric.contrast,
    "Brightness": photometric.brightness,
    "Sharpness": photometric.sharpness,
}


def operation_argument(name: str, magnitude: float, increasing: bool, negate: bool) -> float:
    """The number that an operation takes at a strength.

    Args:
        name: of an operation that takes one.
        magnitude: strength; 10 is the end of the usual range.
        increasing: see `RandAugment`.
        negate: turn the other way, where the operation has two directions.

    Returns:
        Bits to keep (Posterize), threshold (Solarize), levels to add (SolarizeAdd), enhancement factor, degrees
        (Rotate), shear factor, or fraction of the side (TranslateXRel, TranslateYRel).
    """
    level = magnitude / 10
    sign = -1 if negate else 1
    match name:
        case "Posterize":
            bits = int(level * 4)
            return max(4 - bits, 0) if increasing else min(bits, 8)
        case "Solarize":
            threshold = min(256, int(level * 256))
            return 256 - threshold if increasing else threshold
        case "SolarizeAdd":
            return min(128, int(level * 110))
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return max(0.1, 1 + sign * level * 0.9) if increasing else level * 1.8 + 0.1
        case "Rotate":
            return sign * level * 30
        case "ShearX" | "ShearY":
            return sign * level * 0.3
        case "TranslateXRel" | "TranslateYRel":
            return sign * level * 0.45
    raise ValueError(f"{name!r} takes no argument or is not one of {OPERATIONS}")


def _matrix(name: str, argument: float, height: int, width: int) -> tuple[float, ...]:
    match name:
        case "Rotate":
            return affine.rotate(argument, height, width)
        case "ShearX":
            return affine.shear_x(argument)
        case "ShearY":
            return affine.shear_y(argument)
        case "TranslateXRel":
            return affine.translate(argument * width, 0)
    return affine.translate(0, argument * height)
