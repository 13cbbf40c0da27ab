"""`prepare toy`, `prepare co3d` and `prepare verify` from the command line."""

from pathlib import Path

import pytest

from cli.prepare import main
from restrike.data.cache import ShardCache
from restrike.data.multiview_filter import SceneFilter
from restrike.data.multiview_source import open_scenes


def test_a_toy_tree_becomes_a_verified_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, out = str(tmp_path / "tree"), str(tmp_path / "set")
    small = ["--categories", "apple", "ball", "--sequences", "2", "--frames", "3", "--size", "32", "--workers", "1"]
    assert main(["toy", "--out", tree, *small]) == 0
    assert main(["co3d", "--src", tree, "--out", out, "--profile", "full", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "12 frames of 4 sequences, 2 categories in 2 shards" in said and "0 left out" in said
    assert main(["verify", "--data", out]) == 0
    assert len(open_scenes(out, ShardCache(tmp_path), SceneFilter(subsets=("fewview_dev/test",)))) == 2
    (tmp_path / "set" / "co3d-ball-0000.idx").write_bytes(b"x")
    assert main(["verify", "--data", out]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["co3d", "--src", "nowhere", "--out", "o"], "--src: no folder nowhere"),
        (["co3d", "--src", ".", "--out", "o", "--profile", "XL"], "--profile"),
        (["co3d", "--src", ".", "--out", "o", "--name", "a/b"], "--name"),
        (["toy", "--out", "o", "--categories", "cup", "cup"], "--categories"),
        (["toy", "--out", "o", "--frames", "0"], "--frames"),
    ],
)
def test_mistakes_end_with_one_message(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
