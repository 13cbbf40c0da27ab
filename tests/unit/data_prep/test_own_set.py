"""One's own scenes as a shard set: the same bytes however often it is interrupted, and the loader reads it as CO3D."""

import re
from pathlib import Path

import numpy as np
import pytest

from cli.prepare import main
from datamodules import CO3DDataModule
from own_scene_layouts import SIZE, intrinsics, save_picture, shots, write_colmap, write_photos, write_transforms
from restrike.data.cache import ShardCache
from restrike.data.multiview_filter import SceneFilter
from restrike.data.multiview_index import SceneIndex
from restrike.data.multiview_plan import FixedShape
from restrike.data.multiview_source import open_scenes
from restrike.data.multiview_transforms import VGGTViews
from restrike.data.views import RandomViews
from restrike.data_prep.co3d_verify import verify_multiview
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.own_scenes import ReadOptions
from restrike.data_prep.own_set import OwnSetOptions, prepare_scenes

ANY = {"min_quality": None, "require_depth": True}


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    write_colmap(tmp_path / "scenes" / "a wall", shots())
    write_transforms(tmp_path / "scenes" / "b.desk", shots())
    return tmp_path / "scenes"


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def test_a_set_holds_cameras_depth_and_both_parts(scenes: Path, tmp_path: Path) -> None:
    catalogue = prepare_scenes(scenes, tmp_path / "set", OwnSetOptions())
    assert (catalogue.sequences, catalogue.frames, catalogue.left_out) == (2, 12, 0)
    index = SceneIndex.load(tmp_path / "set" / "scenes-0000.idx")
    assert [bytes(key).decode() for key in index.keys] == ["own-a_wall", "own-b_desk"]
    np.testing.assert_allclose(index.world_to_camera[6:], [shot.world_to_camera for shot in shots()], atol=1e-5)
    np.testing.assert_allclose(index.intrinsics[0], [100, 100, 50.5, 35], atol=1e-4)
    names = [bytes(name).decode() for name in index.subset_names]
    assert names == ["own/train", "own/val"]
    assert index.subset_positions[1].tolist() == [0, -1, -1, -1, -1, -1] * 2
    assert verify_multiview(tmp_path / "set") == []
    source = open_scenes(str(tmp_path / "set"), ShardCache(tmp_path / "cache"), SceneFilter(**ANY))
    sparse, dense = source.read(0, np.array([1]))[0], source.read(1, np.array([1]))[0]
    assert sparse.image.shape == dense.image.shape == (*SIZE, 3)
    assert (sparse.depth > 0).mean() < 0.03 and (dense.depth > 0).mean() > 0.99
    known = sparse.depth > 0
    np.testing.assert_allclose(sparse.depth[known], dense.depth[known], rtol=3e-3)
    np.testing.assert_array_equal(sparse.depth_mask, known)


def test_sparse_depth_is_drawn_at_the_stored_size_and_loses_no_point(tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    from restrike.data_prep import scene_shard

    monkeypatch.setitem(scene_shard.SHORT_SIDES, "S", 36)
    folder = write_colmap(tmp_path / "wall", shots())
    prepare_scenes(folder, tmp_path / "set", OwnSetOptions())
    source = open_scenes(str(tmp_path / "set"), ShardCache(tmp_path / "cache"), SceneFilter(**ANY))
    view = source.read(0, np.array([2]))[0]
    assert view.image.shape == (36, 48, 3)
    assert (view.depth > 0).sum() == len(range(0, SIZE[0], 7)) * len(range(0, SIZE[1], 7))
    np.testing.assert_allclose(view.intrinsics, np.diag([0.5, 0.5, 1]) @ intrinsics(), rtol=1e-5)


def test_bytes_do_not_depend_on_workers_or_on_an_interruption(scenes: Path, tmp_path: Path) -> None:
    options = {"scenes_per_shard": 1}
    prepare_scenes(scenes, tmp_path / "one", OwnSetOptions(**options))
    prepare_scenes(scenes, tmp_path / "two", OwnSetOptions(**options))
    (tmp_path / "two" / "scenes-0001.tar").write_bytes(b"half")
    (tmp_path / "two" / "scenes-0001.tar.partial-1").write_bytes(b"left by a killed run")
    kept = (tmp_path / "two" / "scenes-0000.tar").stat().st_mtime_ns
    prepare_scenes(scenes, tmp_path / "two", OwnSetOptions(**options, workers=2))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert (tmp_path / "two" / "scenes-0000.tar").stat().st_mtime_ns == kept, "finished shards are kept"
    prepare_scenes(scenes, tmp_path / "two", OwnSetOptions(**options, read=ReadOptions(val_every=2)))
    assert content(tmp_path / "one") != content(tmp_path / "two"), "another split packs again"


def test_the_datamodule_of_co3d_reads_it(scenes: Path, tmp_path: Path) -> None:
    prepare_scenes(scenes, tmp_path / "set", OwnSetOptions(read=ReadOptions(val_every=2)))
    shape = FixedShape(views=3, size=(56, 56), scenes=1)
    data = CO3DDataModule(
        str(tmp_path / "set"), RandomViews(), shape, VGGTViews(is_training=False),
        SceneFilter(subsets=("own/train",), min_quality=None, min_frames=3),
        SceneFilter(subsets=("own/val",), min_quality=None, min_frames=3),
        shape, VGGTViews(is_training=False), num_workers=0,
    )  # fmt: skip
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sorted(batch.keys[0] for batch in batches) == ["own/a_wall", "own/b_desk"]
    assert all(set(batch.frame_numbers[0].tolist()) <= {1, 3, 5} for batch in batches)
    assert all(set(batch.frame_numbers[0].tolist()) == {0, 2, 4} for batch in data.val_dataloader())
    data.teardown("fit")


def test_photos_without_cameras_are_packed_and_refused_for_training(tmp_path: Path) -> None:
    write_photos(tmp_path / "scenes" / "trip", shots())
    write_transforms(tmp_path / "scenes" / "desk", shots())
    catalogue = prepare_scenes(tmp_path / "scenes", tmp_path / "set", OwnSetOptions())
    assert catalogue.frames == 12 and "without depth" in (tmp_path / "set" / "bad_frames.txt").read_text()
    data, cache = str(tmp_path / "set"), ShardCache(tmp_path / "cache")
    with pytest.raises(ValueError, match="'trip' was packed from photos without cameras, which serve prediction only"):
        open_scenes(data, cache, SceneFilter(**ANY))
    assert len(open_scenes(data, cache, SceneFilter(**ANY, exclude=("trip",)))) == 1
    open_filter = SceneFilter(min_quality=None, require_depth=False, require_cameras=False)
    source = open_scenes(data, cache, open_filter)
    view = source.read(source.sequences.index("trip"), np.array([0]))[0]
    assert np.isnan(view.world_to_camera).all() and view.intrinsics[0, 0] == pytest.approx(1.2 * 96)


def test_bad_frames_are_left_out_named_and_bounded(scenes: Path, tmp_path: Path) -> None:
    (scenes / "b.desk" / "images" / "frame_00002.png").write_bytes(b"no picture")
    (scenes / "b.desk" / "images" / "frame_00003.png").unlink()
    catalogue = prepare_scenes(scenes, tmp_path / "set", OwnSetOptions())
    assert (catalogue.frames, catalogue.left_out) == (10, 2)
    report = (tmp_path / "set" / "bad_frames.txt").read_text()
    assert "sequence 'b_desk', frame 2: images/frame_00002.png: of no known image format" in report
    assert "sequence 'b_desk', frame 3: images/frame_00003.png: No such file" in report
    index = SceneIndex.load(tmp_path / "set" / "scenes-0000.idx")
    assert index.numbers[6:].tolist() == [0, 1, 4, 5]
    with pytest.raises(PrepareError, match="2 frames cannot be used, --max-bad allows 1"):
        prepare_scenes(scenes, tmp_path / "strict", OwnSetOptions(max_bad=1))


def test_the_command_line_packs_and_verifies(scenes: Path, tmp_path: Path, capsys) -> None:  # noqa: ANN001
    out = str(tmp_path / "set")
    assert main(["scenes", "--src", str(scenes), "--out", out, "--val-scenes", "b_desk", "--val-every", "0"]) == 0
    assert "12 frames of 2 scenes in 1 shards" in capsys.readouterr().out
    index = SceneIndex.load(tmp_path / "set" / "scenes-0000.idx")
    assert (index.subset_positions[1] >= 0).tolist() == [False] * 6 + [True] * 6
    assert main(["verify", "--data", out]) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--src", "{scenes}/nothing"], "--src: no folder"),
        (["--out", "{scenes}/b.desk/set"], "lies inside the scenes; choose a folder outside"),
        (["--val-scenes", "c"], "--val-scenes: .* has no 'c'; it has a_wall, b_desk"),
        (["--scale", "0"], "--scale, --depth-unit: expected numbers above 0"),
        (["--category", "a/b"], "letters, digits, - and _ only, got 'a/b'"),
        (["--src", "{scenes}/a wall", "--layout", "transforms"], "has no transforms.json"),
        (["--src", "{scenes}/a wall", "--images", "pictures"], "no folder .*pictures"),
        (["--depth-unit", "1000"], "b_desk.*median depth .* give --scale .* or --depth-unit"),
    ],
)
def test_mistakes_are_one_message(scenes: Path, tmp_path: Path, capsys, options: list[str], expected: str) -> None:  # noqa: ANN001
    given = [option.format(scenes=scenes) for option in options]
    argv = ["scenes", "--src", str(scenes), "--out", str(tmp_path / "set"), "--max-bad", "0", *given]
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(expected, error), error


def test_two_scenes_of_one_name_are_refused(scenes: Path, tmp_path: Path) -> None:
    save_picture(scenes / "b_desk" / "1.jpg", shots()[0].image)
    with pytest.raises(PrepareError, match="two scenes .* would be called 'b_desk'; rename one"):
        prepare_scenes(scenes, tmp_path / "set", OwnSetOptions())
