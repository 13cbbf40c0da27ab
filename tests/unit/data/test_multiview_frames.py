"""Frozen evaluation frames: the same from a seed, from a file and from published orders; changed lists are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from multiview_modules import datamodule
from restrike.data.cache import ShardCache
from restrike.data.multiview_filter import SceneFilter
from restrike.data.multiview_frames import (
    draw_every_scene,
    find_frames,
    frame_lists_hash,
    frame_lists_of,
    load_frame_lists,
    load_frame_orders,
    save_frame_lists,
)
from restrike.data.multiview_source import SceneSource, open_scenes
from restrike.data.views import RandomViews, WindowViews

LISTS = {"apple": {"110_10000_20000": [5, 0, 3]}, "cup": {"112_10011_20011": [1, 2, 4]}}


@pytest.fixture
def source(toy_set: Path) -> SceneSource:
    return open_scenes(str(toy_set), ShardCache(toy_set), SceneFilter(min_quality=None))


@pytest.mark.parametrize("sampler", [RandomViews(), WindowViews(max_interval=2)])
def test_a_seed_draws_every_scene_once_and_the_file_gives_the_same_frames(
    source: SceneSource, sampler: Any, tmp_path: Path
) -> None:
    drawn = draw_every_scene(source, sampler, 3, seed=1)
    assert [one.scene for one in drawn] == list(range(16))
    other = draw_every_scene(source, sampler, 3, seed=2)
    assert any(not np.array_equal(a.positions, b.positions) for a, b in zip(drawn, other, strict=True))
    lists = frame_lists_of(source, drawn)
    digest = save_frame_lists(tmp_path / "deep" / "frames.json", lists)
    again = load_frame_lists(tmp_path / "deep" / "frames.json")
    assert again == lists and digest == frame_lists_hash(again)
    found = find_frames(source, again, 3, "x")
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(drawn, found, strict=True))


def test_numbers_and_not_positions_are_listed(toy_set: Path) -> None:
    odd = open_scenes(
        str(toy_set), ShardCache(toy_set), SceneFilter(subsets=("manyview_dev_0/test",), min_quality=None)
    )
    assert odd.numbers[odd.rows[0]].tolist() == [1, 3, 5, 7]
    (found,) = find_frames(odd, {odd.categories[0]: {odd.sequences[0]: [7, 1]}}, 2, "x")
    assert found.positions.tolist() == [3, 0]


def test_the_hash_is_of_the_lists_and_not_of_their_order_or_spacing() -> None:
    turned = {"cup": LISTS["cup"], "apple": LISTS["apple"]}
    assert frame_lists_hash(turned) == frame_lists_hash(LISTS)
    assert frame_lists_hash({**LISTS, "cup": {"112_10011_20011": [1, 4, 2]}}) != frame_lists_hash(LISTS)


def test_bare_lists_from_elsewhere_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(LISTS))
    assert load_frame_lists(tmp_path / "x.json") == LISTS


def test_a_list_that_was_changed_is_refused(tmp_path: Path) -> None:
    save_frame_lists(tmp_path / "x.json", LISTS)
    content = (tmp_path / "x.json").read_text()
    assert "[5, 0" in content
    (tmp_path / "x.json").write_text(content.replace("[5, 0", "[6, 0"))
    with pytest.raises(ValueError, match=r"data\.val_frames: .*x\.json was changed since it was written"):
        load_frame_lists(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "is no list of frames"), ('{"apple": {"s": ["a"]}}', r"Expected `int`")],
)
def test_another_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=rf"data\.val_frames: .*x\.json.*{message}"):
        load_frame_lists(tmp_path / "x.json")


def test_listed_frames_that_are_not_there_are_named(source: SceneSource) -> None:
    known = source.sequences[0]
    for lists, message in [
        ({"apple": {"nobody": [1, 2, 3]}}, r"'apple/nobody' is not in the set, or data\.val_filter"),
        ({"apple": {known: [1, 2]}}, r"lists 2 frames, data\.val_shape\.views asks for 3"),
        ({"apple": {known: [1, 2, 99]}}, "has no usable frame 99"),
        ({}, "lists no sequence"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_frames(source, lists, 3, "x.json")


def test_published_orders_count_the_usable_frames_and_skip_what_the_filter_drops(
    toy_set: Path,
    tmp_path: Path,
) -> None:
    filter = SceneFilter(categories=("apple",), subsets=("manyview_dev_0/test",), min_quality=None)
    odd = open_scenes(str(toy_set), ShardCache(toy_set), filter)
    orders = {odd.sequences[0]: [2, 0, 3, 1], "left_out": [0]}
    (tmp_path / "apple.json").write_text(json.dumps(orders))
    assert load_frame_orders(tmp_path, odd) == {"apple": {odd.sequences[0]: [5, 1, 7, 3]}}
    (tmp_path / "apple.json").write_text(json.dumps({odd.sequences[0]: [4]}))
    with pytest.raises(ValueError, match=r"apple\.json: index 4 of sequence .* 4 frames after the filter"):
        load_frame_orders(tmp_path, odd)
    (tmp_path / "apple.json").unlink()
    with pytest.raises(ValueError, match=r"apple\.json: No such file"):
        load_frame_orders(tmp_path, odd)


def validate(module: Any, folder: Path | None = None) -> list[Any]:
    if folder is not None:
        options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        module.trainer = Trainer(default_root_dir=folder, **options)
    module.setup("validate")
    return list(module.val_dataloader())


def test_validation_writes_what_it_drew_and_a_run_with_that_file_sees_the_same(toy_set: Path, tmp_path: Path) -> None:
    first = validate(datamodule("cut3r", toy_set), tmp_path)
    listed = load_frame_lists(tmp_path / "val_frames.json")
    assert sum(map(len, listed.values())) == 4
    # Another seed and sampler, and yet the same pictures.
    again = validate(
        datamodule("cut3r", toy_set, seed=77, val_sampler=RandomViews(), val_frames=str(tmp_path / "val_frames.json"))
    )
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.frame_numbers, two.frame_numbers)
    other = validate(datamodule("cut3r", toy_set, seed=77))
    assert any(not torch.equal(a.frame_numbers, b.frame_numbers) for a, b in zip(first, other, strict=True))


def test_a_list_of_some_sequences_evaluates_those_alone(toy_set: Path, tmp_path: Path) -> None:
    validate(datamodule("vggt", toy_set), tmp_path)
    lists = load_frame_lists(tmp_path / "val_frames.json")
    save_frame_lists(tmp_path / "one.json", {"cup": lists["cup"]})
    (batch,) = validate(datamodule("vggt", toy_set, val_frames=str(tmp_path / "one.json")))
    assert batch.valid.tolist() == [True, False, False] and batch.keys[0].startswith("cup/")


def test_sequences_that_are_too_short_for_the_shape_are_told_before_training(toy_set: Path) -> None:
    from restrike.data.multiview_plan import PooledShape

    module = datamodule("cut3r", toy_set, shape=PooledShape(30, ((32, 32),), 1))
    with pytest.raises(
        ValueError, match=r"asks for 30 views, and the longest sequence has 8 usable frames.*allow_repeat"
    ):
        module.setup("fit")
