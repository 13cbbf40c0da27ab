"""A small packed multi-view set of ray-cast scenes for the tests, made once per run."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY_TREE = Path(__file__).parent / "data" / "co3d_tiny"


def edit_annotations(tree: Path, change: Callable[[list[dict[str, Any]]], object], name: str = "frame") -> None:
    """Change the frame (or sequence) annotations of the tree's apples."""
    path = tree / "apple" / f"{name}_annotations.jgz"
    entries = json.loads(gzip.decompress(path.read_bytes()))
    change(entries)
    path.write_bytes(gzip.compress(json.dumps(entries).encode()))


def copy_set(data: Path, folder: Path) -> Path:
    """A packed set, to be damaged."""
    return Path(shutil.copytree(data, folder / "set", ignore=shutil.ignore_patterns(".prepare")))


def repack(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Copy a tar, each member's content changed, or (None) left out."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            if (content := change(member.name, file.read())) is not None:
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="session")
def toy_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 categories (one unseen) x 4 sequences x 8 frames, short side 64; the last sequence of each is held out."""
    from restrike.data_prep.co3d import SceneOptions, prepare_co3d  # not at the top: conftest.py sets threads first
    from restrike.data_prep.toy import ToyOptions, prepare_toy

    folder = tmp_path_factory.mktemp("toy")
    options = ToyOptions(categories=("apple", "bottle", "cup", "ball"), sequences=4, frames=8, size=64)
    prepare_toy(folder / "tree", options)
    prepare_co3d(folder / "tree", folder / "set", SceneOptions(sequences_per_shard=3))
    return folder / "set"
