"""Packing the CO3D tree: the same bytes however often it is interrupted, nothing lost in silence."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from multiview_sets import TINY_TREE
from restrike.data.decode import decode_rgb
from restrike.data.depth_png import decode_depth, decode_mask, decode_mask_pair
from restrike.data.multiview_index import PackedSequence, SceneIndex, load_multiview_catalogue
from restrike.data_prep.co3d import SceneOptions, prepare_co3d
from restrike.data_prep.co3d_tree import read_category
from restrike.data_prep.co3d_verify import verify_multiview
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.scene_set import bad_frame_counts
from restrike.data_prep.scene_shard import foreground_box, stored_size

OPTIONS = SceneOptions(sequences_per_shard=2)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copytree(TINY_TREE, tmp_path / "tree")
    return tmp_path / "tree"


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def first_frame(tree: Path, kind: str) -> Path:
    frame = read_category(tree, "apple").sequences["110_10000_20000"].frames[2]
    return tree / getattr(frame, kind).path


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_set_holds_every_frame_in_stock_webdataset_order(tree: Path, tmp_path: Path) -> None:
    import webdataset

    catalogue = prepare_co3d(tree, tmp_path / "set", OPTIONS)
    assert (catalogue.sequences, catalogue.frames, catalogue.left_out) == (4, 22, 0)
    assert [shard.name for shard in catalogue.shards] == [
        "co3d-apple-0000.tar", "co3d-apple-0001.tar", "co3d-ball-0000.tar",
    ]  # fmt: skip
    samples = list(webdataset.WebDataset(str(tmp_path / "set" / "co3d-apple-0000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["apple-110_10000_20000", "apple-110_10001_20001"]
    about = msgspec.json.decode(samples[1]["0.seq.json"], type=PackedSequence)
    assert about.quality == 0.31 and [frame.number for frame in about.frames] == [0, 1, 2, 3]
    assert about.frames[1].name.endswith("frame000008.jpg") and about.subsets["fewview_dev/train"] == [0, 1, 2, 3]
    source = read_category(tree, "apple").sequences["110_10001_20001"].frames[1]
    assert samples[1]["0001.jpg"] == (tree / source.image.path).read_bytes(), "smaller than the profile: bytes are kept"
    np.testing.assert_array_equal(
        decode_depth(samples[1]["0001.depth.png"]), decode_depth((tree / source.depth.path).read_bytes())
    )
    foreground, depth_mask = decode_mask_pair(samples[1]["0001.mask.png"])
    np.testing.assert_array_equal(foreground, decode_mask((tree / source.mask.path).read_bytes()))
    np.testing.assert_array_equal(depth_mask, decode_mask((tree / source.depth.mask_path).read_bytes()) > 128)


def test_index_has_the_cameras_boxes_and_subsets_of_the_tree(tree: Path, tmp_path: Path) -> None:
    prepare_co3d(tree, tmp_path / "set", OPTIONS)
    index = SceneIndex.load(tmp_path / "set" / "co3d-apple-0000.idx")
    category = read_category(tree, "apple")
    cameras = np.concatenate([category.sequences[name].world_to_camera for name in list(category.sequences)[:2]])
    np.testing.assert_allclose(index.world_to_camera, cameras, rtol=1e-5, atol=1e-5)
    assert index.first.tolist() == [0, 6, 10] and index.has_depth.all()
    names = [bytes(name).decode() for name in index.subset_names]
    assert index.subset_positions[names.index("manyview_dev_0/train")].tolist() == [0, -1, 1, -1, 2, -1, -1, -1, -1, -1]
    left, top, right, bottom = index.boxes[0]
    assert 0 <= left < right <= 96 and 0 <= top < bottom <= 128


def test_a_profile_scales_pictures_cameras_and_depth_alike(tree: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    from restrike.data_prep import co3d_shard

    monkeypatch.setitem(co3d_shard.SHORT_SIDES, "S", 48)
    prepare_co3d(tree, tmp_path / "set", OPTIONS)
    index = SceneIndex.load(tmp_path / "set" / "co3d-apple-0000.idx")
    own = read_category(tree, "apple").sequences["110_10000_20000"].intrinsics[0]
    assert index.sizes[0].tolist() == [64, 48] and index.original_sizes[0].tolist() == [128, 96]
    np.testing.assert_allclose(
        index.intrinsics[0], [own[0, 0] / 2, own[1, 1] / 2, own[0, 2] / 2, own[1, 2] / 2], rtol=1e-5
    )
    tar = (tmp_path / "set" / "co3d-apple-0000.tar").read_bytes()
    parts = [tar[o : o + n] for o, n in zip(index.offsets[0], index.lengths[0], strict=True)]
    assert decode_depth(parts[0]).shape == decode_rgb(parts[1]).shape[:2] == (64, 48)


def test_sizes_and_boxes() -> None:
    assert stored_size((1920, 1080), 384) == (683, 384) and stored_size((300, 400), 384) == (300, 400)
    assert stored_size((1920, 1080), None) == (1920, 1080)
    mask = np.zeros((5, 6), np.uint8)
    assert foreground_box(mask) == (0, 0, 0, 0)
    mask[2, 3:5] = 103
    assert foreground_box(mask) == (3, 2, 5, 3)
    mask[2, 3:5] = 102
    assert foreground_box(mask) == (0, 0, 0, 0), "0.4 is not above 0.4"


def test_bytes_do_not_depend_on_workers_or_on_an_interruption(tree: Path, tmp_path: Path) -> None:
    prepare_co3d(tree, tmp_path / "one", OPTIONS)
    prepare_co3d(tree, tmp_path / "two", OPTIONS)
    (tmp_path / "two" / "co3d-apple-0001.tar").write_bytes(b"half")
    (tmp_path / "two" / ".prepare" / "co3d-ball-0000.tar.json").unlink()
    (tmp_path / "two" / "co3d-apple-0000.tar.partial-1").write_bytes(b"left by a killed run")
    kept = (tmp_path / "two" / "co3d-apple-0000.tar").stat().st_mtime_ns
    prepare_co3d(tree, tmp_path / "two", SceneOptions(sequences_per_shard=2, workers=2))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert (tmp_path / "two" / "co3d-apple-0000.tar").stat().st_mtime_ns == kept, "finished shards are kept"


def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    prepare_co3d(tree, tmp_path / "whole", SceneOptions(sequences_per_shard=1))
    command = (
        "import time; from pathlib import Path; from restrike.data_prep import co3d_shard as s, co3d\n"
        "pack = s._pack_frame\n"
        "s._pack_frame = lambda *a: (time.sleep(0.05), pack(*a))[1]\n"
        f"options = co3d.SceneOptions(sequences_per_shard=1)\n"
        f"co3d.prepare_co3d(Path({str(tree)!r}), Path({str(tmp_path / 'set')!r}), options)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command], cwd=Path(__file__).parents[3], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "set").glob("*-0000.tar")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "set" / "catalogue.json").exists()
    prepare_co3d(tree, tmp_path / "set", SceneOptions(sequences_per_shard=1))
    assert content(tmp_path / "whole") == content(tmp_path / "set")


@pytest.mark.parametrize("kind", ["image", "depth", "mask"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_unusable_frames_are_named_counted_and_bounded(tree: Path, tmp_path: Path, kind: str, damage: str) -> None:
    path = first_frame(tree, kind)
    data = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(data[: len(data) // 2])
    catalogue = prepare_co3d(tree, tmp_path / "set", OPTIONS)
    assert (catalogue.frames, catalogue.left_out) == (21, 1)
    report = (tmp_path / "set" / "bad_frames.txt").read_text()
    assert "1 left out" in report and "sequence '110_10000_20000', frame 2" in report and path.name in report
    index = SceneIndex.load(tmp_path / "set" / "co3d-apple-0000.idx")
    assert index.numbers[:5].tolist() == [0, 1, 3, 4, 5] and index.left_out[0] == 1 and index.bad_cameras[0] == 0
    with pytest.raises(PrepareError, match="1 frames cannot be used, --max-bad allows 0.*frame 2"):
        prepare_co3d(tree, tmp_path / "strict", SceneOptions(sequences_per_shard=2, max_bad=0))


@pytest.mark.parametrize("value", [0.0, np.inf])
def test_a_frame_without_any_depth_is_kept_marked_and_named(tree: Path, tmp_path: Path, value: float) -> None:
    from restrike.data.depth_png import encode_depth

    first_frame(tree, "depth").write_bytes(encode_depth(np.full((128, 96), value)))
    prepare_co3d(tree, tmp_path / "set", OPTIONS)
    assert "0 left out, 1 kept without depth" in bad_frame_counts(tmp_path / "set")
    index = SceneIndex.load(tmp_path / "set" / "co3d-apple-0000.idx")
    assert index.has_depth.tolist() == [True, True, False] + [True] * 7


def test_bad_cameras_are_left_out_and_mark_their_sequence(tree: Path, tmp_path: Path) -> None:
    path = tree / "apple" / "frame_annotations.jgz"
    frames = json.loads(gzip.decompress(path.read_bytes()))
    frames[1]["viewpoint"]["R"] = [[1, 0, 0], [0, 1, 0], [0, 0, 3]]
    frames.append({**frames[0], "sequence_name": "nobody"})
    path.write_bytes(gzip.compress(json.dumps(frames).encode()))
    catalogue = prepare_co3d(tree, tmp_path / "set", OPTIONS)
    assert catalogue.frames == 21
    assert SceneIndex.load(tmp_path / "set" / "co3d-apple-0000.idx").bad_cameras.tolist() == [1, 0]
    report = (tmp_path / "set" / "bad_frames.txt").read_text()
    assert "R is no rotation" in report and "sequence 'nobody', frame 0" in report


def test_splits_of_raydiffusion_and_vggt_become_subsets_in_their_order(tree: Path, tmp_path: Path) -> None:
    paths = [frame.image.path for frame in read_category(tree, "apple").sequences["110_10002_20002"].frames]
    for name in ("ray", "vggt"):
        (tmp_path / name).mkdir()
        table = {"110_10002_20002": [{"filepath": path, "extri": []} for path in (paths[4], paths[0], paths[2])]}
        (tmp_path / name / "apple_test.jgz").write_bytes(gzip.compress(json.dumps(table).encode()))
    derived = (("raydiffusion", tmp_path / "ray"), ("vggt", tmp_path / "vggt"))
    prepare_co3d(tree, tmp_path / "set", SceneOptions(sequences_per_shard=2, derived=derived))
    index = SceneIndex.load(tmp_path / "set" / "co3d-apple-0001.idx")
    names = [bytes(name).decode() for name in index.subset_names]
    for name in ("raydiffusion/test", "vggt/test"):
        assert index.subset_positions[names.index(name)].tolist() == [1, -1, 2, -1, 0, -1]


DAMAGED = {
    "no gzip": b"no gzip",
    "no JSON": gzip.compress(b"[]x"),
    "no such table": gzip.compress(b'{"s": [{"path": 1}]}'),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_derived_splits_are_named(tree: Path, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "apple_train.jgz").write_bytes(data)
    with pytest.raises(PrepareError, match="apple_train.jgz"):
        prepare_co3d(tree, tmp_path / "set", SceneOptions(derived=(("raydiffusion", tmp_path / "ray"),)))


def test_verify_finds_a_flipped_byte_and_names_the_sequence(tree: Path, tmp_path: Path) -> None:
    prepare_co3d(tree, tmp_path / "set", OPTIONS)
    assert verify_multiview(tmp_path / "set") == []
    tar = tmp_path / "set" / "co3d-apple-0000.tar"
    index = SceneIndex.load(tar.with_suffix(".idx"))
    with open(tar, "r+b") as file:
        file.seek(int(index.offsets[7, 1]) + 50)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    (problem,) = verify_multiview(tmp_path / "set")
    assert "co3d-apple-0000.tar: sha256 differs" in problem and "'apple-110_10001_20001'" in problem


def test_mistakes_are_told_with_the_flag(tree: Path, tmp_path: Path) -> None:
    for src, out, options, said in [
        (tmp_path / "none", tmp_path / "o", OPTIONS, "--src: no folder"),
        (tmp_path, tmp_path / "o", OPTIONS, "--src: .* holds no <category>"),
        (tree, tree / "set", OPTIONS, "--out: .* inside the tree"),
        (tree, tmp_path / "o", SceneOptions(categories=("dog",)), "--categories: .* has no dog; it has apple, ball"),
        (tree, tmp_path / "o", SceneOptions(profile="XL"), "--profile: expected S, L, full"),
        (tree, tmp_path / "o", SceneOptions(derived=(("vggt", tmp_path / "x"),)), "--vggt-annotations: no folder"),
    ]:
        with pytest.raises(PrepareError, match=said):
            prepare_co3d(src, out, options)
    prepare_co3d(tree, tmp_path / "set", OPTIONS)
    with pytest.raises(PrepareError, match="another set"):
        prepare_co3d(tree, tmp_path / "set", SceneOptions(name="other"))


def test_catalogue_counts_and_repeats(tree: Path, tmp_path: Path) -> None:
    catalogue = prepare_co3d(tree, tmp_path / "set", SceneOptions(categories=("ball",)))
    assert catalogue.categories == ["ball"]
    data = (tmp_path / "set" / "catalogue.json").read_bytes()
    assert load_multiview_catalogue(data, "x") == catalogue
