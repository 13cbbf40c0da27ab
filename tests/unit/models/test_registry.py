import pytest

from restrike.models import build, list_models


def test_names_are_listed_by_family():
    assert list_models("fastervit") == [n for n in list_models() if n.startswith("faster_vit")]
    with pytest.raises(ValueError, match=r"unknown family 'resnet'; there are: fastervit"):
        list_models("resnet")


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(ValueError, match=r"unknown model 'fastervit_0_224'; nearest: faster_vit_0_224"):
        build("fastervit_0_224")


def test_an_unknown_argument_gets_the_nearest_ones():
    with pytest.raises(ValueError, match=r"faster_vit_0_224 has no argument 'window_sizes'; nearest: window_size"):
        build("faster_vit_0_224", window_sizes=(7, 7, 7, 7))
