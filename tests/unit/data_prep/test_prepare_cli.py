"""`python -m cli prepare`: one message and exit code 2 for a mistake, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cli.prepare import main
from restrike.data_prep.progress import Progress
from shard_tools import write_tree

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


def imagenet(src, out, *more):
    return main(["imagenet", "--src", str(src), "--out", str(out), "--workers", "1", *more])


def test_imagenet_then_verify(tmp_path, tree, capsys):
    out = tmp_path / "out"
    assert imagenet(tree, out, "--train-shards", "3", "--val-shards", "2") == 0
    assert "20 train, 7 validation images of 3 classes in 5 shards" in capsys.readouterr().out
    assert (out / "imagenet1k-train-0002.tar").is_file()
    assert main(["verify", "--data", str(out), "--decode"]) == 0
    shard = out / "imagenet1k-train-0002.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert main(["verify", "--data", str(out)]) == 1
    assert "imagenet1k-train-0002.tar: sha256 differs" in capsys.readouterr().out


def test_left_out_images_are_told_at_the_end(tmp_path, tree, capsys):
    (tree / "train" / "cat" / "broken.jpg").write_bytes(b"")
    assert imagenet(tree, tmp_path / "out", "--max-bad", "1", "--train-shards", "1") == 0
    assert "1 unreadable images were left out; they are named in" in capsys.readouterr().out


def no_folder(tree):
    return tree / "nowhere"


def no_val(tree):
    (tree / "val").rename(tree / "validation")
    return tree


def flat_val(tree):
    for folder in list((tree / "val").iterdir()):
        for image in folder.iterdir():
            image.rename(tree / "val" / image.name)
        folder.rmdir()
    return tree


def empty_class(tree):
    (tree / "train" / "fox").mkdir()
    return tree


def other_classes(tree):
    (tree / "val" / "emu").rename(tree / "val" / "eel")
    return tree


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_folder, "--src: no folder"),
        (no_val, "has no folder 'val' (it holds train, validation)"),
        (flat_val, "has no class folders: it holds 7 images, but outside class folders"),
        (empty_class, "fox has no image"),
        (other_classes, "class folders that only val/ has: eel (1 in all)"),
    ],
)
def test_a_wrong_tree_is_one_message(tmp_path, tree, spoil, message, capsys):
    assert imagenet(spoil(tree), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_source_and_output_may_not_be_one_folder(tree, capsys):
    assert imagenet(tree, tree) == 2
    assert "lies in the images' own folder" in capsys.readouterr().err
    assert imagenet(tree, tree / "train" / "shards") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["imagenett"], "invalid choice: 'imagenett'"),
        (["imagenet", "--out", "x"], "the following arguments are required: --src"),
        (["digits", "--out", "x", "--train-shards", "0"], "argument --train-shards: expected at least 1, got 0"),
        (["digits", "--out", "x", "--trainshards", "2"], "unrecognized arguments: --trainshards"),
        (["digits", "--out", "x", "--name", "../x"], "--name: letters, digits, - and _ only"),
        (["verify", "--data", "nowhere"], "no catalogue.json in nowhere"),
    ],
)
def test_a_wrong_command_line_is_one_message(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_is_no_error(capsys):
    assert main(["imagenet", "--help"]) == 0
    assert "--max-bad" in capsys.readouterr().out


def test_a_file_in_the_way_of_the_output_is_one_message(tmp_path, tree, capsys):
    (tmp_path / "out").write_text("")
    assert imagenet(tree, tmp_path / "out") == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_the_command_imports_neither_lightning_nor_torch():
    code = "import sys, cli.prepare; print([m for m in ('torch', 'lightning', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_progress_without_a_terminal_is_a_few_whole_lines(capsys):
    progress = Progress(1000, "images")
    for _ in range(1000):
        progress.add(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[-1].startswith("1,000/1,000 images (100 %)")
