"""A small packed multi-view set of ray-cast scenes for the tests, made once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

TINY_TREE = Path(__file__).parent / "data" / "co3d_tiny"


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
