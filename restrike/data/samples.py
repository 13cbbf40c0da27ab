"""The typed batches that leave the data layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ImageBatch(NamedTuple):
    """A batch of labelled images.

    Attributes:
        images: uint8 [B, 3, H, W] from the loader; float and normalised after the datamodule's transfer hook.
        targets: int64 [B] class index (-1 = unknown), or float32 [B, K] soft targets after mixing.
        valid: bool [B]; False marks a padding row of an evaluation batch (never in training): no metric, loss or
            writer may count it.
        keys: one name a row, for messages and predictions; "" in padding rows.
        seed: pure function of (seed, epoch, step, rank); drives what is random on the device (erasing).
    """

    images: Tensor
    targets: Tensor
    valid: Tensor
    keys: list[str]
    seed: int
