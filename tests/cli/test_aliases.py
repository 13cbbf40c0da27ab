"""The flags of the guide that this project replaces, as the guide spells them."""

import pytest

from cli.arguments import split
from cli.errors import UserError


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--wandb"], []),
        (["--wandb=true"], []),
        (["--wandb_project", "p"], ["--logger.wandb.project=p"]),
        (["--wandb_group=g"], ["--logger.wandb.group=g"]),
        (["--wandb_job_type", "train"], ["--logger.wandb.job_type=train"]),
        (["--wandb_entity", "lab"], ["--logger.wandb.entity=lab"]),
        (["--wandb", "--wandb_mode", "offline"], ["--logger.wandb.mode=offline"]),
        (["--wandb_resume_id", "abc"], ["--logger.wandb.id=abc", "--logger.wandb.resume=must"]),
        (["--wandb_resume_id=abc"], ["--logger.wandb.id=abc", "--logger.wandb.resume=must"]),
        (["logger=wandb", "--wandb"], []),
    ],
)
def test_a_flag_about_wandb_chooses_its_logger_and_sets_its_option(flags, options):
    got = split(["fit", *flags])
    assert got.overrides == ["logger=wandb"]
    assert got.options == options


def test_freeze_backbone_adds_the_freezing_of_the_backbone():
    assert split(["fit", "--freeze_backbone"]).overrides == ["+freeze=backbone"]
    assert split(["fit", "--freeze_backbone=false", "--wandb=False"]).overrides == []


def test_a_flag_takes_no_value_that_follows():
    got = split(["fit", "--freeze_backbone", "model=wide", "--wandb", "-m"])
    assert got.overrides == ["+freeze=backbone", "logger=wandb", "model=wide"]
    assert got.multirun and not got.options


@pytest.mark.parametrize("flags", [["--wandb_project"], ["--wandb_project", "--wandb"], ["--wandb=perhaps"]])
def test_a_missing_or_needless_value_is_refused(flags):
    with pytest.raises(UserError):
        split(["fit", *flags])
