"""Each evaluation set of several views is scored by its protocol: a perfect network is perfect, a known error is found,
and every recipe runs with a tiny network on a tiny tree in the genuine layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor

from callbacks import ViewBenchmark
from cli import registry
from cli.__main__ import main
from cli.compose import compose_all
from datamodules import EvaluationViewsDataModule
from evaluation_trees import SIZE, WIDE, Tree, write_tree
from restrike.data.evaluation_sets import PROTOCOLS
from restrike.data.photo_views import CUT3RPhotos
from restrike.data.predicted_views import PredictedViews
from restrike.geometry import axis_angle_to_matrix, compose_se3, invert_se3
from restrike.models import build

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {name: ROOT / "conf" / "eval" / f"{name.replace('-', '_')}.yaml" for name in PROTOCOLS}
VIDEO = [name for name, protocol in PROTOCOLS.items() if protocol.scoring == "video_depth"]
SINGLE = [name for name, protocol in PROTOCOLS.items() if protocol.scoring == "frame_depth"]
POSES = [name for name, protocol in PROTOCOLS.items() if protocol.scoring == "trajectory"]
CLOUDS = [name for name, protocol in PROTOCOLS.items() if protocol.scoring == "reconstruction"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, Tree]:
    return {name: write_tree(name, tmp_path_factory.mktemp(name)) for name in PROTOCOLS}


class Oracle(LightningModule):
    """Knows the truth of every picture, in a world of its own (the first camera's), perhaps with an error."""

    predicts_only = False

    def __init__(
        self, tree: Tree, factor: float = 1.0, shift: float = 0.0, camera: Tensor | None = None, only: int | None = None
    ) -> None:
        super().__init__()
        self.only = only
        self.frames, self.factor, self.shift = tree.frames, factor, shift
        self.camera = torch.eye(3, 4, dtype=torch.float64) if camera is None else camera
        self.first: Tensor | None = None
        self.scenes = 0

    def on_predict_start(self) -> None:
        self.first = None
        self.scenes += 1

    def test_step(self, batch, batch_idx):
        assert self.predicts_only
        return self.predict_step(batch, batch_idx)

    validation_step = test_step

    def predict_step(self, batch, batch_idx):
        grid = batch.images.shape[-2:]
        cameras, depths, intrinsics = [], [], []
        for key in batch.keys:
            truth = self.frames[key]
            pose = truth.camera_to_world
            pose = torch.eye(3, 4, dtype=torch.float64) if pose is None else torch.from_numpy(pose)
            self.first = pose if self.first is None else self.first
            relative = compose_se3(invert_se3(self.first), pose)
            relative[:, 3] *= self.factor
            # The error turns or moves each further camera a little more than the one before, or only one camera.
            cameras.append(invert_se3(compose_se3(relative, self.error(len(cameras) + int(batch.frame_numbers[0, 0])))))
            depth = torch.ones(grid) if truth.depth is None else torch.from_numpy(truth.depth)
            depths.append(self.factor * depth + self.shift)
            intrinsics.append(torch.eye(3) if truth.intrinsics is None else torch.from_numpy(truth.intrinsics))
        world_to_camera = torch.stack(cameras)[None]
        views = PredictedViews(world_to_camera, torch.stack(intrinsics)[None], torch.stack(depths)[None])
        return {"world_to_camera": world_to_camera, "views": views}

    def error(self, number: int) -> Tensor:
        result = torch.eye(3, 4, dtype=torch.float64)
        steps = number if self.only is None else int(number == self.only)
        for _ in range(steps):
            result = compose_se3(result, self.camera)
        return result


def score(tree: Tree, protocol: str, oracle: Oracle, tmp_path: Path, **options) -> dict[str, float]:
    streaming = options.pop("is_streaming", True)
    data = EvaluationViewsDataModule(
        str(tree.root), CUT3RPhotos(SIZE[1], patch_size=8), protocol, is_streaming=streaming, num_threads=1
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ViewBenchmark(**options)], default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.test(oracle, data, verbose=False)
    assert oracle.scenes == len(data.view_set.sequences) and not oracle.predicts_only
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert record["frame_list_sha256"] == data.view_set.sha256
    return {name.removeprefix("test/"): value for name, value in record.items() if name.startswith("test/")}


def test_every_protocol_has_a_recipe():
    assert all(file.is_file() for file in RECIPES.values())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composes_and_says_what_it_is_about(name):
    config = compose_all([str(RECIPES[name])], []).config
    registry.check(config)
    assert config["run_dir"] == f"runs/eval_{RECIPES[name].stem}" and config["data"]["init_args"]["protocol"] == name
    header = RECIPES[name].read_text().partition("defaults:")[0]
    words = ("Expect:", "Measured:", "Hardware:", "Data:", f"conf/eval/{RECIPES[name].stem}.yaml", "arXiv")
    assert all(word in header for word in words)


@pytest.mark.parametrize("name", VIDEO)
def test_perfect_video_depth_is_perfect_and_a_known_error_is_found(trees, tmp_path, name):
    both = {"alignments": ["metric", "scale"]}
    perfect = score(trees[name], name, Oracle(trees[name]), tmp_path, **both)
    assert perfect == pytest.approx(
        {"abs_rel_metric": 0, "delta@1.25_metric": 1, "abs_rel_scale": 0, "delta@1.25_scale": 1}, abs=1e-6
    )
    scaled = score(trees[name], name, Oracle(trees[name], factor=1.1), tmp_path, **both)
    assert scaled["abs_rel_metric"] == pytest.approx(0.1, abs=1e-5) and scaled["delta@1.25_metric"] == 1
    assert scaled["abs_rel_scale"] == pytest.approx(0, abs=1e-5)
    wrong = score(trees[name], name, Oracle(trees[name], factor=1.3), tmp_path, **both)
    assert wrong["delta@1.25_metric"] == 0 and wrong["delta@1.25_scale"] == 1


def test_a_shift_is_what_scale_and_shift_takes_away(trees, tmp_path):
    oracle = Oracle(trees["kitti-depth"], shift=0.05)
    found = score(trees["kitti-depth"], "kitti-depth", oracle, tmp_path)
    assert found["abs_rel_metric"] > 0.01 and found["abs_rel_scale"] > 0.001
    assert found["abs_rel_scale_shift"] < 0.5 * found["abs_rel_metric"]


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_frame_has_its_own_scale(trees, tmp_path, name):
    found = score(trees[name], name, Oracle(trees[name], factor=7.0), tmp_path)
    assert found == pytest.approx({"abs_rel": 0, "delta@1.25": 1}, abs=1e-5)
    shifted = score(trees[name], name, Oracle(trees[name], factor=1.0, shift=1.0), tmp_path)
    assert shifted["abs_rel"] > 0.01


@pytest.mark.parametrize("name", POSES)
@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_trajectory_is_compared_after_one_similarity(trees, tmp_path, name, is_streaming):
    perfect = score(trees[name], name, Oracle(trees[name], factor=3.0), tmp_path, is_streaming=is_streaming)
    assert perfect == pytest.approx({"ate": 0, "rpe_translation": 0, "rpe_rotation": 0}, abs=1e-5)


@pytest.mark.parametrize("name", ["sintel-pose", "tum-pose"])
def test_a_turned_camera_is_the_relative_rotation_error(trees, tmp_path, name):
    angle = torch.deg2rad(torch.tensor(2.0, dtype=torch.float64))
    turn = torch.cat([axis_angle_to_matrix(angle * torch.tensor([0, 0, 1.0])), torch.zeros(3, 1)], 1).double()
    found = score(trees[name], name, Oracle(trees[name], camera=turn, only=1), tmp_path)
    assert found["ate"] == pytest.approx(0, abs=1e-5)  # the centres stay
    # Of three steps, that to the turned camera and that from it are 2 degrees wrong.
    assert found["rpe_rotation"] == pytest.approx(2 * (2 / 3) ** 0.5, abs=1e-4)


def test_relative_poses_are_compared_in_all_pairs(trees, tmp_path):
    perfect = score(trees["re10k"], "re10k", Oracle(trees["re10k"]), tmp_path, is_streaming=False)
    assert perfect["auc@30"] == perfect["auc@30_invariant"] == perfect["rra@5"] == perfect["rta@5"] == 1
    turn = axis_angle_to_matrix(torch.deg2rad(torch.tensor([0, 0, 4.5], dtype=torch.float64)))
    oracle = Oracle(trees["re10k"], camera=torch.cat([turn, torch.zeros(3, 1, dtype=torch.float64)], 1))
    found = score(trees["re10k"], "re10k", oracle, tmp_path, is_streaming=False)
    # Of 45 pairs, 9 are one step apart, 8 two steps, … each 4.5 degrees; the threshold is 5, 15, 30.
    assert found["rra@5"] == pytest.approx(9 / 45) and found["rra@15"] == pytest.approx(24 / 45)


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_perfect_reconstruction_in_another_scale_is_perfect(trees, tmp_path, name, is_streaming):
    oracle = Oracle(trees[name], factor=2.5)
    found = score(
        trees[name], name, oracle, tmp_path, is_streaming=is_streaming, max_points=None if is_streaming else 999
    )
    assert found["accuracy"] < 1e-4 and found["completeness"] < 1e-4 and found["uncompared"] == 0
    assert found["normal_consistency"] > 0.999


def test_a_moved_camera_spoils_a_reconstruction(trees, tmp_path):
    move = torch.eye(3, 4, dtype=torch.float64)
    move[2, 3] = 0.3
    found = score(trees["nrgbd"], "nrgbd", Oracle(trees["nrgbd"], camera=move), tmp_path, max_points=1000)
    assert 0.005 < found["accuracy"] < 0.6 and found["completeness"] > 0.005


def test_a_prediction_that_is_not_finite_is_counted_and_not_left_out(trees, tmp_path):
    tree = trees["seven-scenes"]
    found = score(tree, "seven-scenes", Oracle(tree, factor=float("nan")), tmp_path)
    assert found["uncompared"] == len(tree.sequences)
    lost = score(trees["sintel-pose"], "sintel-pose", Oracle(trees["sintel-pose"], factor=float("nan")), tmp_path)
    assert lost["ate"] != lost["ate"]


CUT3R = ["model=cut3r_tiny", "--data.transform.init_args.patch_size", "8"]
VGGT = ["model=vggt_tiny", "data=evaluation_vggt", "--data.transform.init_args.patch_size", "8"]
DIFFUSIONSFM = ["model=diffusionsfm_tiny", "data=evaluation_diffusionsfm", "--model.num_steps", "10"]
FEW = ["--callbacks.view_benchmark.init_args.max_points", "300"]
FEW += ["--callbacks.view_benchmark.init_args.alignments", "[metric, scale]"]


def run(name: str, tree: Tree, run_dir: Path, family: list[str], *more: str) -> int:
    size = ["--data.transform.init_args.size", "48"]
    line = ["test", "--config", str(RECIPES[name]), *family, *size, *FEW, *more, "trainer.accelerator=cpu"]
    return main([*line, "--data.root", str(tree.root), "--run_dir", str(run_dir)])


# One of each way to score; the others differ by their reader, which other tests run.
FAST = ("sintel-depth", "kitti-mono", "tum-pose", "seven-scenes", "re10k")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES])
def test_a_recipe_runs_with_a_tiny_network(trees, tmp_path, capsys, name):
    cases = {"CUT3R": CUT3R} if name != "re10k" else {"CUT3R": [*CUT3R, "data=evaluation_cut3r"], "VGGT": VGGT}
    if name == "re10k":
        cases["DiffusionSfM"] = DIFFUSIONSFM
    if name in ("sintel-depth", "seven-scenes", "tum-pose"):
        cases["VGGT"] = VGGT
    hashes = set()
    for family, options in cases.items():
        assert run(name, trees[name], tmp_path / family, options) == 0
        record = json.loads((tmp_path / family / "benchmark.json").read_text())
        printed = capsys.readouterr().out
        assert record["protocol"] == name and any(key.startswith("test/") for key in record)
        assert record["weights"] is None and "random weights" in printed
        assert PROTOCOLS[name].title in printed and record["frame_list_sha256"][:16] in printed
        hashes.add(record["frame_list_sha256"])
    assert len(hashes) == 1  # the same frames, whatever the family


def test_a_stream_says_the_same_of_each_sequence_as_the_whole_of_it(trees, tmp_path):
    torch.manual_seed(1)
    model = compose_all([str(RECIPES["tum-pose"])], ["model=cut3r_tiny"]).config["model"]["init_args"]
    weights = tmp_path / "weights.pth"
    torch.save(build(model["model_name"], **model["model_args"]).state_dict(), weights)
    found = []
    for streaming in ("true", "false"):
        more = ["--data.is_streaming", streaming, "--model.pretrained", str(weights)]
        assert run("tum-pose", trees["tum-pose"], tmp_path / streaming, CUT3R, *more) == 0
        record = json.loads((tmp_path / streaming / "benchmark.json").read_text())
        assert record["weights"] == "weights.pth"
        found.append([record[f"test/{name}"] for name in ("ate", "rpe_translation", "rpe_rotation")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # so the second sequence began anew


def test_ranks_share_the_sequences(trees):
    def rows(rank: int) -> list[str]:
        tree = trees["kitti-mono"]
        data = EvaluationViewsDataModule(str(tree.root), CUT3RPhotos(48, patch_size=8), "kitti-mono")
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        data.setup("test")
        return [key for batch in data.test_dataloader() for key in batch.keys]

    assert [len(rows(0)), len(rows(1))] == [2, 1]
    assert sorted([*rows(0), *rows(1)]) == sorted(trees["kitti-mono"].frames)


def test_a_part_of_a_protocol_is_called_a_part(trees, tmp_path, capsys):
    assert run("sintel-mono", trees["sintel-mono"], tmp_path, CUT3R, "--trainer.limit_test_batches", "3") == 0
    assert "INCOMPLETE: the first 3 of 8 batches" in capsys.readouterr().out
    assert json.loads((tmp_path / "benchmark.json").read_text())["is_whole"] is False


def test_depth_is_evaluated_on_the_whole_picture(trees):
    assert WIDE == (32, 96)
    tree = trees["kitti-depth"]
    data = EvaluationViewsDataModule(str(tree.root), CUT3RPhotos(80, patch_size=16), "kitti-depth", is_streaming=True)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert batch.images.shape[-2:] == (16, 80)  # 26.7 rows at 80 columns, squeezed to a multiple of the patch
    assert batch.crop_boxes[0, 0].tolist() == [0, 0, 96, 32]
    cut = EvaluationViewsDataModule(str(trees["sintel-pose"].root), CUT3RPhotos(80, patch_size=16), "sintel-pose")
    cut.setup("test")
    batch = next(iter(cut.test_dataloader()))
    assert batch.images.shape[-2:] == (48, 80) and batch.crop_boxes[0, 0, 1] > 0


def test_a_whole_picture_is_not_a_centred_square():
    square = CUT3RPhotos(224, is_square=True)
    assert square.for_depth() is square  # the 224-pixel models see no more
    with pytest.raises(ValueError, match="is not the whole picture"):
        CUT3RPhotos(224, is_square=True, is_whole=True)
    view = CUT3RPhotos(96).for_depth()(Image.new("RGB", (50, 50)))
    assert view.image.shape == (3, 64, 96) and view.crop_box.tolist() == [0, 0, 50, 50]  # a square becomes 4:3


def refused(capsys, code: int) -> str:
    assert code == 2
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
    return error


def test_mistakes_are_one_message(trees, tmp_path, capsys):
    tree = trees["sintel-depth"]
    nowhere = Tree(tmp_path / "nowhere")
    assert "data.root: no folder" in refused(capsys, run("sintel-depth", nowhere, tmp_path / "run", CUT3R))
    assert "has none of the protocol's sequences" in refused(
        capsys, run("sintel-depth", Tree(trees["nrgbd"].root), tmp_path / "run", CUT3R)
    )
    without = [*VGGT, "--model.model_args.enable_depth", "false"]
    message = refused(capsys, run("sintel-depth", tree, tmp_path / "run", without))
    assert "sintel-depth scores depth, and this network says none" in message
    message = refused(capsys, run("sintel-depth", tree, tmp_path / "run", CUT3R, "--data.protocol", "davis"))
    assert "data.protocol" in message and "'seven-scenes'" in message


def test_a_module_that_says_nothing_of_views_is_refused(trees):
    trainer = SimpleNamespace(datamodule=SimpleNamespace(view_set=1, protocol="re10k", root=1, own_sequences=1))
    with pytest.raises(ValueError, match="callbacks.view_benchmark needs predicts_only of LightningModule"):
        ViewBenchmark().setup(trainer, LightningModule(), "test")
    with pytest.raises(ValueError, match="for test and validate only"):
        ViewBenchmark().setup(trainer, Oracle(trees["re10k"]), "fit")


def test_doctor_looks_for_the_frames_of_a_protocol(trees, capsys):
    line = ["doctor", "--config", str(RECIPES["tum-pose"]), "model=cut3r_tiny", "--data.root"]
    assert main([*line, str(trees["tum-pose"].root)]) == 0
    assert PROTOCOLS["tum-pose"].title in capsys.readouterr().out
    assert main([*line, str(trees["re10k"].root)]) != 0
    assert "has none of the protocol's sequences" in capsys.readouterr().out


def test_an_unreadable_file_ends_the_evaluation_with_its_name(tmp_path, capsys):
    tree = write_tree("bonn-depth", tmp_path / "set")
    picture = sorted((tree.root / "rgbd_bonn_crowd3" / "rgb").iterdir())[2]
    whole = picture.read_bytes()
    picture.write_bytes(whole[:100])
    message = refused(capsys, run("bonn-depth", tree, tmp_path / "run", CUT3R))
    assert picture.name in message and "no frame may be left out" in message
    picture.write_bytes(whole)
    depth = sorted((tree.root / "rgbd_bonn_crowd3" / "depth").iterdir())[1]
    depth.write_bytes(whole)  # a colour picture
    message = refused(capsys, run("bonn-depth", tree, tmp_path / "run", CUT3R))
    assert depth.name in message and "expected depth as a 16-bit grey PNG" in message


def test_a_long_sequence_costs_no_memory(trees):
    tree = trees["scannet-pose"]
    data = EvaluationViewsDataModule(str(tree.root), CUT3RPhotos(48, patch_size=8), "scannet-pose", is_streaming=True)
    data.setup("test")
    loaded: list[str] = []
    load = data.load
    data.load = lambda image: (loaded.append(image), load(image))[1]  # type: ignore[method-assign]
    for number, batch in enumerate(data.test_dataloader(), start=1):
        assert batch.images.shape[:2] == (1, 1) and len(loaded) <= number + 2
    assert len(loaded) == sum(len(sequence.frames) for sequence in data.view_set.sequences) == 10


@pytest.mark.parametrize("family", ["vggt", "diffusionsfm"])
def test_co3d_recipes_print_their_protocol_and_the_hash_of_their_frames(toy_set, tmp_path, capsys, family):
    recipe = str(ROOT / "conf" / "eval" / f"co3d_{family}.yaml")
    small = str(ROOT / "conf" / "smoke" / f"{family}.yaml")
    line = ["test", "--config", recipe, "--config", small, "--data.data", str(toy_set), "--run_dir", str(tmp_path)]
    assert main(line) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "report.json").read_text())
    protocol = compose_all([recipe], []).config["data"]["init_args"]["protocol"]
    assert record["protocol"].startswith(protocol) and record["protocol"] in printed
    assert "frame list sha256 " in record["protocol"]
    if family == "vggt":
        frozen = json.loads((tmp_path / "val_frames.json").read_text())["sha256"]
        assert frozen[:16] in record["protocol"] and frozen in printed and "test/auc@30" in record
    else:
        orders = [json.loads(file.read_text())["sha256"][:16] for file in sorted(tmp_path.glob("test_frames_*.json"))]
        assert len(orders) == 2 and ", ".join(orders) in record["protocol"]
        assert any(name.startswith("test/seen/") for name in record)
