"""The command line, taken apart."""

import pytest

from cli.arguments import split
from cli.errors import UserError


def test_configs_overrides_and_options_are_told_apart():
    got = split(
        ["fit", "--config", "a.yaml", "-c", "b.yaml", "--config=c.yaml", "model=wide", "--model.lr", "0.1"]
        + ["~callbacks.ema", "+x=1", "--trainer.devices=2", "-m", "--allow_class_path", "mine", "++a.b=[1,2]"]
    )
    assert got.subcommand == "fit"
    assert got.configs == ["a.yaml", "b.yaml", "c.yaml"]
    assert got.overrides == ["model=wide", "~callbacks.ema", "+x=1", "++a.b=[1,2]"]
    assert got.options == ["--model.lr", "0.1", "--trainer.devices=2"]
    assert got.allowed == ["mine"]
    assert got.multirun


def test_an_options_value_may_look_like_an_override():
    assert split(["fit", "--vars", "a=1", "b=2"]).options == ["--vars", "a=1"]


def test_print_config_takes_no_value():
    got = split(["fit", "--print_config", "model=wide"])
    assert (got.options, got.overrides) == (["--print_config"], ["model=wide"])


@pytest.mark.parametrize(
    "argv", [[], ["train"], ["fit", "--config"], ["fit", "--config", "--model.lr"], ["fit", "hello"]]
)
def test_what_cannot_be_understood_is_refused(argv):
    with pytest.raises(UserError):
        split(argv)
