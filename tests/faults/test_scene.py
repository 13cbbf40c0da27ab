"""Multi-view data that is damaged, wrong or hostile: named with file, sequence and mend; never other depth or views."""

import gzip
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faults.cases import case
from multiview_modules import batches_of, datamodule
from multiview_sets import TINY_TREE, copy_set, edit_annotations, repack
from restrike.data.batches import TooManyBadSamplesError
from restrike.data.cache import ShardCache
from restrike.data.depth_png import encode_depth
from restrike.data.multiview_filter import SceneFilter
from restrike.data.multiview_index import SceneIndex, build_scene_index
from restrike.data.multiview_plan import PooledShape
from restrike.data.multiview_source import SceneSource, open_scenes
from restrike.data.shards import ShardFile
from restrike.data.source import BadSampleError
from restrike.data.tar import TarError
from restrike.data_prep.co3d import SceneOptions, prepare_co3d
from restrike.data_prep.co3d_tree import read_category
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.scene_set import REPORT_NAME

SEQUENCE = "110_10000_20000"
NAN = float("nan")
ANY = SceneFilter(min_quality=None, require_depth=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A CO3D tree of 22 frames."""
    return Path(shutil.copytree(TINY_TREE, tmp_path / "tree"))


def file_of(tree: Path, kind: str) -> Path:
    """Of the apple's frame 2."""
    return tree / getattr(read_category(tree, "apple").sequences[SEQUENCE].frames[2], kind).path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_viewpoint(key: str, value: Any) -> Callable[[Path], Any]:
    return lambda tree: edit_annotations(tree, lambda frames: frames[2]["viewpoint"].update({key: value}))


def lead_out(tree: Path) -> None:
    edit_annotations(tree, lambda frames: frames[2]["mask"].update(path="../../etc/passwd"))


def wrong_size(tree: Path) -> None:
    edit_annotations(tree, lambda frames: frames[2]["image"].update(size=[64, 64]))


BAD_FRAMES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "the image is missing": (lambda t: file_of(t, "image").unlink(), r"images/frame000007\.jpg: No such file"),
    "the depth map is missing": (lambda t: file_of(t, "depth").unlink(), r"frame000007\.jpg\.geometric\.png: No such"),
    "the mask is missing": (lambda t: file_of(t, "mask").unlink(), r"masks/frame000007\.png: No such file"),
    "the image is truncated": (lambda t: cut(file_of(t, "image")), r"images/frame000007\.jpg: .*truncated"),
    "the depth map is truncated": (lambda t: cut(file_of(t, "depth")), r"geometric\.png: depth: truncated PNG"),
    "the mask is truncated": (lambda t: cut(file_of(t, "mask")), r"frame000007\.png: mask: truncated PNG"),
    "the depth map is no PNG": (lambda t: file_of(t, "depth").write_bytes(b"x" * 99), "depth: not a PNG"),
    "the image has another size than annotated": (wrong_size, r"\[128, 96\] pixels, annotated as \[64, 64\]"),
    "the mask's path leads out of the tree": (lead_out, "leads out of the data set; refused"),
    "R mirrors": (edit_viewpoint("R", [[1, 0, 0], [0, 1, 0], [0, 0, -1]]), r"jgz: R is no rotation \(determinant -1"),
    "R shears": (edit_viewpoint("R", [[1, 0.3, 0], [0, 1, 0], [0, 0, 1]]), "jgz: R is no rotation"),
    "R holds NaN": (edit_viewpoint("R", [[NAN, 0, 0], [0, 1, 0], [0, 0, 1]]), "jgz: camera R or T is not finite"),
    "T is infinite": (edit_viewpoint("T", [float("inf"), 0, 0]), "jgz: camera R or T is not finite"),
    "the focal length is NaN": (edit_viewpoint("focal_length", [NAN, 2.0]), r"jgz: focal_length \(nan, 2\.0\)"),
    "the focal length is negative": (edit_viewpoint("focal_length", [-2.0, 2.0]), "expected two positive numbers"),
    "the focal length is 0": (edit_viewpoint("focal_length", [0.0, 2.0]), "expected two positive numbers"),
    "the principal point is NaN": (edit_viewpoint("principal_point", [NAN, 0]), "principal_point .* is not finite"),
    "intrinsics of an unknown format": (edit_viewpoint("intrinsics_format", "pixels"), "intrinsics_format 'pixels'"),
}  # fmt: skip


@case("scene", "{fault}", promise="left out, counted and named with file and sequence; too many stop with the mend")
@pytest.mark.parametrize("fault", BAD_FRAMES)
def test_a_bad_frame(fault: str, tree: Path, tmp_path: Path) -> None:
    break_it, message = BAD_FRAMES[fault]
    break_it(tree)
    catalogue = prepare_co3d(tree, tmp_path / "set", SceneOptions(categories=("apple",)))
    assert (catalogue.frames, catalogue.left_out) == (15, 1)
    report = (tmp_path / "set" / REPORT_NAME).read_text()
    named = rf"sequence '{SEQUENCE}', frame 2: .*{message}"
    assert "# 15 frames packed; 1 left out" in report
    with pytest.raises(PrepareError, match=rf"{named}.*Fetch them again, or raise --max-bad"):
        prepare_co3d(tree, tmp_path / "strict", SceneOptions(categories=("apple",), max_bad=0))


@case("scene", "a frame is listed twice", promise="the first entry is kept, the other counted and named")
def test_a_duplicate_frame(tree: Path, tmp_path: Path) -> None:
    edit_annotations(tree, lambda frames: frames.append({**frames[2], "frame_timestamp": 99.0}))
    catalogue = prepare_co3d(tree, tmp_path / "set", SceneOptions(categories=("apple",)))
    assert (catalogue.frames, catalogue.left_out) == (16, 1)
    assert (
        f"sequence '{SEQUENCE}', frame 2: apple/frame_annotations.jgz: this frame_number comes twice"
        in (tmp_path / "set" / REPORT_NAME).read_text()
    )
    index = SceneIndex.load(tmp_path / "set" / "co3d-apple-0000.idx")
    assert index.numbers[:6].tolist() == list(range(6)) and 99.0 not in index.timestamps


@case("scene", "every depth pixel is {value}", promise="kept, named in the report, left out by require_depth")
@pytest.mark.parametrize("value", ["0", "inf", "nan"])
def test_a_frame_without_any_depth(value: str, tree: Path, tmp_path: Path) -> None:
    file_of(tree, "depth").write_bytes(encode_depth(np.full((128, 96), float(value))))
    prepare_co3d(tree, tmp_path / "set", SceneOptions(categories=("apple",)))
    report = (tmp_path / "set" / REPORT_NAME).read_text()
    assert f"without depth\tsequence '{SEQUENCE}', frame 2: apple/" in report and "left out by require_depth" in report
    with_depth, every = (
        open_scenes(str(tmp_path / "set"), ShardCache(tmp_path), SceneFilter(min_quality=None, require_depth=only))
        for only in (True, False)
    )
    assert with_depth.numbers[with_depth.rows[0]].tolist() == [0, 1, 3, 4, 5]
    (view,) = every.read(0, np.array([2]))
    assert view.depth.max() == 0 and not every.has_depth[2]


@case("scene", "one depth pixel is infinite", promise="that pixel is unknown; the rest of the frame keeps its depth")
def test_one_infinite_pixel(tree: Path, tmp_path: Path) -> None:
    depth = np.full((128, 96), 2.0, dtype=np.float32)
    depth[5, 7] = np.inf
    file_of(tree, "depth").write_bytes(encode_depth(depth))
    prepare_co3d(tree, tmp_path / "set", SceneOptions(categories=("apple",)))
    (view,) = open_scenes(str(tmp_path / "set"), ShardCache(tmp_path), ANY).read(0, np.array([2]))
    assert view.depth[5, 7] == 0 and int((view.depth == 2).sum()) == 128 * 96 - 1


TABLES: dict[str, Callable[[bytes], bytes]] = {
    "no gzip file": lambda data: b"<html>404</html>",
    "a truncated gzip file": lambda data: data[: len(data) // 2],
    "flipped bytes": lambda data: data[:200] + bytes(50) + data[250:],
    "no JSON": lambda data: gzip.compress(gzip.decompress(data)[:-9]),
    "JSON of another form": lambda data: gzip.compress(b'{"sequence_name": 1}'),
    "an entry without its image or name": lambda data: gzip.compress(b'[{"frame_number": 3}]'),
    "empty": lambda data: b"",
}


@case("scene", "an annotation table is {table}", promise="preparation stops before it packs; names the file and mend")
@pytest.mark.parametrize("table", TABLES)
def test_a_corrupt_table(table: str, tree: Path, tmp_path: Path) -> None:
    for name in ("frame_annotations.jgz", "sequence_annotations.jgz"):
        shutil.rmtree(tree)
        shutil.copytree(TINY_TREE, tree)
        path = tree / "apple" / name
        path.write_bytes(TABLES[table](path.read_bytes()))
        with pytest.raises(PrepareError, match=rf"apple/{name}: .*fetch this file again"):
            prepare_co3d(tree, tmp_path / "set", SceneOptions())
        assert not list((tmp_path / "set").glob("*.tar"))


# What was packed


def opened(data: Path) -> SceneSource:
    return open_scenes(str(data), ShardCache(data), ANY)


def overwrite(tar: Path, offset: int, data: bytes) -> None:
    with open(tar, "r+b") as file:
        file.seek(offset)
        file.write(data)


@case("scene", "bytes of a frame's {member} flip in a shard", promise="found by CRC before decoding; named with frame")
@pytest.mark.parametrize("member", ["depth", "image", "mask"])
def test_a_flipped_byte(member: str, toy_set: Path, tmp_path: Path) -> None:
    data = copy_set(toy_set, tmp_path)
    tar = data / "co3d-apple-0000.tar"
    place = SceneIndex.load(tar.with_suffix(".idx")).offsets[2, ("depth", "image", "mask").index(member)]
    overwrite(tar, int(place) + 60, b"\0\0")
    with pytest.raises(BadSampleError, match=r"frame 2: damaged: .*prepare or fetch this shard again"):
        opened(data).read(0, np.array([2]))
    assert len(opened(data).read(0, np.array([1, 3]))) == 2


@case("scene", "a frame's {kind} was packed truncated", promise="refused with frame and reason, never read as black")
@pytest.mark.parametrize("kind", ["depth.png", "mask.png", "jpg"])
def test_a_truncated_member(kind: str, toy_set: Path, tmp_path: Path) -> None:
    whole, tar = toy_set / "co3d-apple-0000.tar", tmp_path / "x.tar"
    repack(whole, tar, lambda name, data: data[:-30] if name.endswith(f"{SEQUENCE}.0002.{kind}") else data)
    source = SceneSource([ShardFile(str(tar))], [build_scene_index(tar)], ShardCache(tmp_path), ANY)
    with pytest.raises(BadSampleError, match=r"frame 2: .*truncated"):
        source.read(0, np.array([2]))
    assert source.place(0) == f"shard {tar}" and source.key(0) == f"apple/{SEQUENCE}"
    assert source.read(0, np.array([1]))


@case("scene", "more scenes are damaged than allowed", promise="the run ends and names sequence, shard, frame and mend")
def test_too_many_damaged_scenes(toy_set: Path, tmp_path: Path) -> None:
    data = copy_set(toy_set, tmp_path)
    for tar in data.glob("co3d-apple-*.tar"):
        index = SceneIndex.load(tar.with_suffix(".idx"))
        for offset in index.offsets[:, 1].tolist():
            overwrite(tar, offset + 20, bytes(8))
    message = r"'apple/110_\d+_\d+' in shard .*co3d-apple-000\d\.tar: frame \d: damaged.*prepare verify"
    with pytest.raises(TooManyBadSamplesError, match=message):
        batches_of(datamodule("vggt", data, max_bad_samples=1), 12)


@case("scene", "a shard shrinks during the run", promise="its frames are bad, by name; other shards still load")
def test_a_shard_that_shrinks(toy_set: Path, tmp_path: Path) -> None:
    data = copy_set(toy_set, tmp_path)
    source = opened(data)
    (data / "co3d-apple-0000.tar").write_bytes(b"")
    with pytest.raises(BadSampleError, match=r"the shard is truncated: 0 of \d+ bytes of frame 1"):
        source.read(0, np.array([1]))
    assert source.read(len(source) - 1, np.array([0]))


@case("scene", "a training shape asks for more views than a sequence has", promise="told before training, with both")
def test_fewer_frames_than_views(toy_set: Path) -> None:
    module = datamodule("cut3r", toy_set, shape=PooledShape(30, ((32, 32),), 1))
    with pytest.raises(ValueError, match=r"data\.shape asks for 30 views, .* has 8 usable frames; lower data\.shape"):
        module.setup("fit")


@case("scene", "a list of evaluation frames has fewer than the views asked for", promise="told with sequence and both")
def test_a_short_frame_list(toy_set: Path, tmp_path: Path) -> None:
    (tmp_path / "frames.json").write_text('{"apple": {"110_10003_20003": [1, 2]}}')
    module = datamodule("vggt", toy_set, val_frames=str(tmp_path / "frames.json"))
    with pytest.raises(
        ValueError, match=r"frames\.json: sequence 'apple/110_10003_20003' lists 2 frames, .* asks for 3"
    ):
        module.setup("validate")


def write_member(path: Path, name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> Path:
    """A tar of one member."""
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, target, 2 if kind == tarfile.REGTYPE else 0
        tar.addfile(info, io.BytesIO(b"{}"))
    return path


HOSTILE: dict[str, tuple[tuple[Any, ...], str]] = {
    "a name with ../": (("../a-1.0.seq.json",), r"'\.\./a-1\.0\.seq\.json' points outside"),
    "an absolute name": (("/etc/a-1.0.seq.json",), "points outside"),
    "a symbolic link": (("a-1.0.seq.json", tarfile.SYMTYPE, "/etc/passwd"), "is a symbolic link"),
    "a hard link": (("a-1.0.seq.json", tarfile.LNKTYPE, "/etc/passwd"), "is a hard link"),
    "a device": (("a-1.0.seq.json", tarfile.CHRTYPE), "is a device"),
    "a pickle": (("a-1.0.pkl",), "would be unpickled"),
    "a tensor file": (("a-1.0000.pth",), "would be unpickled"),
}


@case("scene", "a member of a scene shard is {member}", promise="refused with shard and member; never followed or run")
@pytest.mark.parametrize("member", HOSTILE)
def test_a_hostile_member(member: str, tmp_path: Path) -> None:
    arguments, message = HOSTILE[member]
    with pytest.raises(TarError, match=rf"x\.tar: member.*{message}"):
        build_scene_index(write_member(tmp_path / "x.tar", *arguments))


MISSING: dict[str, tuple[str, str]] = {
    "table of cameras": ("0.seq.json", r"sample 'apple-110_10000_20000' does not begin with its \.0\.seq\.json"),
    "depth": ("0003.depth.png", r"has no member .*\.0003\.depth\.png; prepare this set again"),
    "image": ("0003.jpg", r"has no member .*\.0003\.jpg"),
    "mask": ("0003.mask.png", r"has no member .*\.0003\.mask\.png"),
}


@case("scene", "a shard lacks the {member} of a sequence", promise="refused with shard, sequence and member")
@pytest.mark.parametrize("member", MISSING)
def test_a_missing_member(member: str, toy_set: Path, tmp_path: Path) -> None:
    end, message = MISSING[member]
    repack(toy_set / "co3d-apple-0000.tar", tmp_path / "x.tar", lambda n, data: None if n.endswith(end) else data)
    with pytest.raises(TarError, match=message):
        build_scene_index(tmp_path / "x.tar")


def pickled(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, version=np.array([{"an": "object"}], dtype=object))


def older(path: Path) -> None:
    with np.load(path) as file:
        values = dict(file)
    with open(path, "wb") as target:
        np.savez(target, **{**values, "version": np.int64(1)})


DAMAGED_SETS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda d: (d / "co3d-cup-0000.tar").unlink(), r"co3d-cup-0000\.tar is missing; prepare or"),
    "a shard is truncated": (
        lambda d: cut(d / "co3d-cup-0000.tar"),
        r"cup-0000\.tar has \d+ bytes, its catalogue says",
    ),
    "an index is truncated": (lambda d: cut(d / "co3d-cup-0000.idx"), r"index .*cup-0000\.idx is damaged .*prepare"),
    "an index holds a pickle": (lambda d: pickled(d / "co3d-cup-0000.idx"), r"cup-0000\.idx is damaged"),
    "an index is of an older version": (
        lambda d: older(d / "co3d-cup-0000.idx"),
        r"idx has version 1, .* prepare again",
    ),
    "the catalogue is truncated": (lambda d: cut(d / "catalogue.json"), r"is not the catalogue of a multi-view set"),
    "the catalogue is missing": (lambda d: (d / "catalogue.json").unlink(), "no multi-view set in .*prepare toy"),
    "the catalogue names a shard outside": (
        lambda d: (d / "catalogue.json").write_text((d / "catalogue.json").read_text().replace("co3d-cup", "../cup")),
        "refused",
    ),
}


@case("scene", "{damage}", promise="refused by name before training starts, with the mend")
@pytest.mark.parametrize("damage", DAMAGED_SETS)
def test_a_damaged_set(damage: str, toy_set: Path, tmp_path: Path) -> None:
    break_it, message = DAMAGED_SETS[damage]
    data = copy_set(toy_set, tmp_path)
    break_it(data)
    with pytest.raises(ValueError, match=message):
        opened(data)
