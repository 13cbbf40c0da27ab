"""Images on one sheet, each framed by whether its prediction is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_RIGHT, _WRONG, _UNKNOWN = (34, 139, 84), (200, 48, 44), (70, 90, 130)
_INK, _PAPER = (30, 30, 30), (255, 255, 255)
_FRAME, _GAP, _LINE = 3, 6, 13


class Prediction(NamedTuple):
    """One image and what the network says about it. `image` is uint8 [3, H, W]; `confidence` is in [0, 1]."""

    image: Tensor
    key: str
    truth: str | None  # None where nobody knows
    predicted: str
    confidence: float


def contact_sheet(predictions: Sequence[Prediction], columns: int | None = None, tile: int = 128) -> Image.Image:
    """Draw the predictions row by row: a green frame where they are right, a red one with the true class where not,
    a blue one where the truth is not known.

    Args:
        predictions: At least one.
        columns: None makes the sheet about square.
        tile: Side of an image in pixels; small images are enlarged without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not predictions:
        raise ValueError("expected at least one prediction to draw")
    columns = columns or math.ceil(math.sqrt(len(predictions)))
    rows = math.ceil(len(predictions) / columns)
    width, height = tile + 2 * _FRAME + _GAP, tile + 2 * _FRAME + 3 * _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for index, prediction in enumerate(predictions):
        left = _GAP + (index % columns) * width
        top = _GAP + (index // columns) * height
        is_right = prediction.predicted == prediction.truth
        colour = _UNKNOWN if prediction.truth is None else _RIGHT if is_right else _WRONG
        side = tile + 2 * _FRAME
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=colour)
        sheet.paste(_tile(prediction.image, tile), (left + _FRAME, top + _FRAME))
        lines = (
            (f"{prediction.predicted}: {100 * prediction.confidence:.0f} %", colour),
            ("" if is_right or prediction.truth is None else f"is {prediction.truth}", _INK),
            (prediction.key, _INK),
        )
        for number, (text, ink) in enumerate(lines):
            position = (left, top + side + number * _LINE)
            draw.text(position, _shorten(text, font, side), fill=ink, font=font)
    return sheet


def _tile(image: Tensor, side: int) -> Image.Image:
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    enlarge = max(picture.size) < side
    return picture.resize((side, side), Image.Resampling.NEAREST if enlarge else Image.Resampling.BICUBIC)


def _shorten(text: str, font: object, width: int) -> str:
    """Cut the front off: the end of a file name says more than its folder."""
    length = font.getlength  # type: ignore[attr-defined]
    if length(text) <= width:
        return text
    while text and length(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"
