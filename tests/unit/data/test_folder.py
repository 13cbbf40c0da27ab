"""Folders are listed in torchvision's order."""

from __future__ import annotations

import pytest
from torchvision.datasets import ImageFolder

from restrike.data.folder import list_image_folder, list_images
from shard_tools import picture


def put(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(1) if not name.endswith(".txt") else b"no image")


def test_classes_labels_and_order_are_those_of_torchvision(tmp_path):
    put(
        tmp_path, "n02/b.JPEG", "n02/a.jpg", "n02/sub/z.png", "n02/Sub/y.PNG", "n01/c.webp", "N03/d.bmp", "n10/e.jpeg",
        "n9/f.tiff", "n9/notes.txt", *(f"n9/{name}/{name}.png" for name in "zqxacmbe"), "n9/.hidden.jpg", "readme.txt",
    )  # fmt: skip
    theirs = ImageFolder(tmp_path)
    ours = list_image_folder(tmp_path, "data.data")
    assert ours.classes == theirs.classes
    assert [(str(tmp_path / p), y) for p, y in zip(ours.paths, ours.labels, strict=True)] == theirs.samples


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"--src: .*train has no class folders: it is empty"),
        (("a.jpg", "b.jpg"), "holds 2 images, but outside class folders"),
        (("cat/a.jpg", "dog/notes.txt"), "class folder .*dog has no image"),
    ],
)
def test_a_folder_that_is_no_tree_says_what_is_expected(tmp_path, names, message):
    (tmp_path / "train").mkdir()
    put(tmp_path / "train", *names)
    with pytest.raises(ValueError, match=message):
        list_image_folder(tmp_path / "train", "--src")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.data: no folder .*nowhere"):
        list_image_folder(tmp_path / "nowhere", "data.data")


def test_images_are_found_at_any_depth(tmp_path):
    put(tmp_path, "b.jpg", "a/deep/c.PNG", "a/x.txt")
    assert list_images(tmp_path) == ["b.jpg", "a/deep/c.PNG"]
