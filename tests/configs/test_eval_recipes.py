"""Each test set of ImageNet's classes is evaluated by its own protocol, on tiny trees in its genuine layout."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cli import registry
from cli.__main__ import main
from cli.compose import compose_all
from restrike.data.imagenet_variants import PROTOCOLS, open_evaluation_set, real_labels, synsets
from restrike.metrics.label_maps import label_map_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(file.stem for file in (ROOT / "conf" / "eval").glob("imagenet*.yaml"))
TINY = [
    "model=fastervit_tiny",
    "--data.image_size",
    "64",
    "--data.num_workers",
    "0",
    "--data.batch_size_per_device",
    "4",
]
pytestmark = pytest.mark.filterwarnings("ignore")

FILES = {
    "imagenet": ["n01440764/ILSVRC2012_val_00000293.JPEG", "n15075141/ILSVRC2012_val_00000001.JPEG"],
    "imagenet-v2": [f"{number}/{number:x}ab.jpeg" for number in (0, 1, 2, 10, 100, 999)],
    "imagenet-r": ["n01443537/art_0.jpg", "n12267677/sketch_7.jpg", "n12267677/toy_1.jpg"],
    "imagenet-a": ["n01498041/0.000116_digital clock.jpg", "n12267677/0.01_acorn.jpg"],
    "imagenet-sketch": ["n01440764/sketch_0.JPEG", "n15075141/sketch_12.JPEG"],
    "imagenet-real": [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3)],
}


def write(root: Path, names: list[str]) -> Path:
    random = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / name, "JPEG")
    return root


def test_label_maps_are_the_published_ones():
    assert len(synsets()) == 1000 and synsets() == sorted(synsets())
    assert synsets()[0] == "n01440764" and synsets()[999] == "n15075141"  # tench, toilet tissue
    for subset in ("imagenet_r", "imagenet_a"):
        assert len(set(synsets(subset))) == 200 and set(synsets(subset)) <= set(synsets())
    labels = real_labels()
    assert len(labels) == 50_000
    assert sum(map(bool, labels)) == PROTOCOLS["imagenet-real"].num_images == 46_837


def test_every_protocol_has_a_recipe():
    assert [name.replace("_", "-") for name in RECIPES] == sorted(PROTOCOLS) == sorted(FILES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composes_and_says_what_it_is_about(name):
    file = ROOT / "conf" / "eval" / f"{name}.yaml"
    config = compose_all([str(file)], ["model=fastervit_4"]).config
    registry.check(config)
    assert config["run_dir"] == f"runs/eval_{name}" and config["data"]["init_args"]["protocol"] == name.replace(
        "_", "-"
    )
    assert config["model"]["init_args"]["model_name"] == "faster_vit_4_224"
    header = file.read_text().partition("defaults:")[0]
    assert all(word in header for word in ("Expect:", "Measured:", "Data:", f"conf/eval/{name}.yaml"))


@pytest.mark.parametrize("protocol", sorted(FILES))
def test_labels_come_from_names_and_not_from_the_order_of_folders(tmp_path, protocol):
    chosen = open_evaluation_set(protocol, write(tmp_path, FILES[protocol]))
    found = dict(zip(chosen.paths, chosen.targets, strict=True))
    if protocol == "imagenet-v2":
        assert {int(path.partition("/")[0]): target for path, target in found.items()} == {
            number: number for number in (0, 1, 2, 10, 100, 999)
        }
    elif protocol == "imagenet-real":  # the first image has no label; targets are rows of the label sets
        assert found == {"ILSVRC2012_val_00000002.JPEG": 1, "ILSVRC2012_val_00000003.JPEG": 2}
        assert chosen.label_sets[1] == [970, 795]
    else:
        assert found == {path: synsets().index(path.partition("/")[0]) for path in FILES[protocol]}
    if chosen.classes is not None:
        assert len(chosen.classes) == 200 and set(found.values()) <= set(chosen.classes)
    names = sorted(path.rpartition("/")[2] if protocol == "imagenet-real" else path for path in found)
    assert chosen.sha256 == hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
    assert not chosen.is_whole and "INCOMPLETE" in chosen.description and chosen.sha256[:16] in chosen.description


def test_real_takes_class_folders_too_and_its_hash_does_not_see_them(tmp_path):
    flat = open_evaluation_set("imagenet-real", write(tmp_path / "flat", ["ILSVRC2012_val_00000002.JPEG"]))
    deep = open_evaluation_set("imagenet-real", write(tmp_path / "deep", ["n01/ILSVRC2012_val_00000002.JPEG"]))
    assert flat.targets == deep.targets == [1] and flat.sha256 == deep.sha256


@pytest.mark.parametrize(
    "protocol, names, message",
    [
        ("imagenet", ["cats/a.jpg"], "folder 'cats' .* is no WordNet id"),
        ("imagenet-r", ["n01440764/a.jpg"], "folder 'n01440764' .* is no WordNet id of the set"),  # tench is not in -R
        ("imagenet-v2", ["n01440764/a.jpg"], "no class number 0 to 999"),
        ("imagenet-real", ["a.jpg"], "a.jpg is no validation image"),
        ("imagenet-real", ["ILSVRC2012_val_00050001.JPEG"], "is no validation image"),
        ("imagenet-real", ["ILSVRC2012_val_00000001.JPEG"], "no labelled image"),
    ],
)
def test_another_layout_is_named_with_the_right_one(tmp_path, protocol, names, message):
    with pytest.raises(ValueError, match=rf"data\.images: .*{message}"):
        open_evaluation_set(protocol, write(tmp_path, names))


def test_a_subset_is_answered_among_its_classes_alone():
    logits = torch.tensor([[9.0, 1.0, 5.0, 2.0], [9.0, 3.0, 1.0, 2.0], [0.0, 0.0, 0.0, 9.0]])
    targets, valid = torch.tensor([2, 3, 1]), torch.tensor([True, True, False])
    metrics = label_map_metrics("test/", classes=[1, 2, 3])
    metrics.update(logits, targets, valid)
    assert {name: float(value) for name, value in metrics.compute().items()} == {"test/top1": 0.5, "test/top5": 1.0}
    plain = label_map_metrics("test/")
    plain.update(logits, targets, valid)
    assert float(plain.compute()["test/top1"]) == 0.0


def test_any_label_of_a_set_is_right():
    sets = [[], [3], [0, 2]]
    logits = torch.eye(8)[[2, 3, 1, 0]]
    metrics = label_map_metrics(label_sets=sets)
    metrics.update(logits, torch.tensor([2, 1, 1, 2]), torch.tensor([True, True, True, False]))
    assert float(metrics.compute()["top1"]) == pytest.approx(2 / 3)


class Answers(nn.Module):
    """Says one class for every image, and another one louder."""

    def __init__(self, answer: int, louder: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(1000))
        with torch.no_grad():
            self.logits[answer], self.logits[louder] = 1.0, 2.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1)


TENCH, ACORN = 0, 988  # tench is not among -R's classes


@pytest.mark.parametrize(
    "name, answer, louder, top1",
    [("imagenet", 5, TENCH, 1 / 2), ("imagenet_r", ACORN, TENCH, 2 / 3), ("imagenet_real", 5, 970, 1 / 2)],
)
def test_a_recipe_counts_by_its_protocol(tmp_path, monkeypatch, capsys, name, answer, louder, top1):
    protocol = name.replace("_", "-")
    monkeypatch.setattr("lightning_modules.base.build_network", lambda *_, **__: Answers(answer, louder))
    images = write(tmp_path / "set", FILES[protocol])
    line = ["--data.images", str(images), "--run_dir", str(tmp_path / "run"), *TINY]
    assert main(["test", "--config", str(ROOT / "conf" / "eval" / f"{name}.yaml"), *line]) == 0
    record = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert record["test/top1"] == pytest.approx(top1) and record["protocol"] == protocol
    printed = capsys.readouterr().out
    assert PROTOCOLS[protocol].title in printed and record["file_list_sha256"][:16] in printed
    assert f"raw weights: top-1 {100 * top1:.2f} %" in printed


def test_mistakes_are_one_message(tmp_path, capsys):
    recipe = str(ROOT / "conf" / "eval" / "imagenet_r.yaml")
    assert main(["test", "--config", recipe, "--data.images", str(tmp_path / "nowhere"), *TINY]) == 2
    assert "no folder" in capsys.readouterr().err
    images = write(tmp_path / "set", FILES["imagenet-r"])
    run = ["--data.images", str(images), "--run_dir", str(tmp_path / "run"), *TINY]
    assert main(["predict", "--config", recipe, *run]) == 2
    assert "is for test and validate only" in capsys.readouterr().err
    assert main(["test", "--config", recipe, *run, "--data.num_classes", "10"]) == 2
    assert "the label maps are about 1000 classes, got 10" in capsys.readouterr().err
