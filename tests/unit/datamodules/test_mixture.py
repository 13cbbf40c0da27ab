"""A mixture of data sets, of which one is there."""

from __future__ import annotations

import pytest

from datamodules import MixtureDataModule
from multiview_modules import datamodule

MIXTURE = {"Co3d_Multi": 20, "ScanNet_Multi": 30}


def mixed(toy_set, **changes):
    parts = datamodule("cut3r", toy_set)
    given = {
        "data": str(toy_set),
        "sampler": parts.sampler,
        "shape": parts.shape,
        "transform": parts.transform,
        "filter": parts.filters["train"],
        "val_filter": parts.filters["val"],
        "val_shape": parts.val_shape,
        "val_transform": parts.val_transform,
    }
    return MixtureDataModule(MIXTURE, **{**given, **changes})


def test_an_epoch_is_as_long_as_the_mixture_says(toy_set):
    assert mixed(toy_set).epoch_length == 20


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use": ["ScanNet_Multi"]}, "nothing here reads ScanNet_Multi"),
        ({"use": ["Co3d"]}, "nearest: Co3d_Multi"),
        ({"use": []}, "expected"),
        ({"epoch_length": 21}, "20 samples"),
    ],
)
def test_what_it_cannot_give_is_refused(toy_set, changes, message):
    with pytest.raises(ValueError, match=message):
        mixed(toy_set, **changes)
