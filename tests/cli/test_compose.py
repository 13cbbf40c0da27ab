"""Hydra's composition, and the layers over it."""

from pathlib import Path

import pytest

from cli.compose import compose_all, layer
from cli.errors import UserError

TINY = str(Path(__file__).parent / "recipes" / "conf" / "tiny.yaml")


def test_groups_fill_the_recipe_and_interpolations_wait():
    composed = compose_all([TINY], [])
    assert composed.config["model"]["init_args"] == {"out_dim": 10}
    assert set(composed.config["callbacks"]) == {"lr_monitor", "timer"}
    assert composed.config["trainer"]["limit_train_batches"] == "${vars.batches}"
    assert composed.choices["model"] == "narrow"
    assert "hydra" not in composed.config


def test_overrides_select_set_add_and_delete():
    overrides = [
        "model=wide",
        "~callbacks.timer",
        "trainer.max_epochs=3",
        "+vars.more=[1,2]",
        "callbacks=[timer,lr_monitor]",
    ]
    config = compose_all([TINY], overrides).config
    assert config["model"]["init_args"]["out_dim"] == 20
    assert list(config["callbacks"]) == ["lr_monitor"]
    assert config["trainer"]["max_epochs"] == 3
    assert config["vars"]["more"] == [1, 2]


def test_a_later_file_goes_over_the_recipe_and_the_shell_over_both(tmp_path):
    extra = tmp_path / "extra.yaml"
    extra.write_text("trainer: {max_epochs: 5, max_steps: 7}\ncallbacks: {timer: null}\n")
    config = compose_all([TINY, str(extra)], ["trainer.max_steps=9"]).config
    assert (config["trainer"]["max_epochs"], config["trainer"]["max_steps"]) == (5, 9)
    assert config["callbacks"]["timer"] is None
    assert config["callbacks"]["lr_monitor"] is not None


def test_another_class_takes_no_arguments_of_the_old_one():
    merged = layer(
        {"m": {"class_path": "a.A", "init_args": {"x": 1}}}, {"m": {"class_path": "b.B", "init_args": {"y": 2}}}
    )
    assert merged == {"m": {"class_path": "b.B", "init_args": {"y": 2}}}


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["modle=wide"], "Did you mean 'model'?"),
        (["model=wid"], "Did you mean 'wide'?"),
        (["trainr.max_epochs=3"], "Did you mean 'trainer'?"),
        (["~callbacks.timr"], "Did you mean 'callbacks.timer'?"),
        (["trainer.max_epochs=1,2"], "add -m"),
        (["model=["], "model=["),
    ],
)
def test_a_wrong_override_names_the_nearest_right_one(overrides, hint):
    with pytest.raises(UserError) as error:
        compose_all([TINY], overrides)
    assert hint in str(error.value)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"fastervit_00.yaml.*Did you mean 'conf/fastervit_0.yaml'"):
        compose_all(["conf/fastervit_00.yaml"], [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2\n")
    with pytest.raises(UserError, match="(?s)broken.yaml' is not valid YAML.*line 2"):
        compose_all([str(broken)], [])
    broken.write_text("- 1\n")
    with pytest.raises(UserError, match="must hold a mapping"):
        compose_all([str(broken)], [])
    broken.write_text("a: 1\n")
    with pytest.raises(UserError, match="no defaults: list"):
        (tmp_path / "model").mkdir()
        compose_all([str(broken)], ["model=wide"])


def test_a_recipe_in_a_subfolder_must_say_that_it_is_global(tmp_path):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [_self_]\nrun_dir: x\n")
    with pytest.raises(UserError, match="@package _global_"):
        compose_all([str(folder / "mine.yaml")], [])
    (folder / "mine.yaml").write_text("# @package _global_\ndefaults: [_self_]\nrun_dir: x\n")
    assert compose_all([str(folder / "mine.yaml")], []).config == {"run_dir": "x"}
