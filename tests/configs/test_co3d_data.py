"""The data groups of the multi-view recipes: from an empty folder, through the command line, to batches of each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf

from cli.prepare import main
from datamodules import CO3DDataModule
from restrike.data.samples import MultiViewBatch

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = sorted(path.stem for path in (CONF / "data").glob("co3d_*.yaml"))
SMALL = ["num_workers=0", "shape.init_args.scenes=2", "val_shape.scenes=1"]
VGGT = ["num_workers=0", "filter.min_frames=2", "val_filter.min_frames=2"]  # the toy sequences are short

# What the specification of each stage says: epoch length, views, whether the count varies, scenes, shapes, repeats.
CUT3R = {
    "stage1": (32000, 4, False, 16, 1, False),
    "stage2": (48000, 4, False, 16, 1, False),
    "stage3": (44800, 4, False, 16, 10, True),
    "stage4": (22400, 32, False, 16, 10, False),
    "dpt_512_vary_4_64": (44800, 64, True, 4, 10, True),
    "linear_224_fixed_16": (44800, 16, False, 6, 1, False),
}


def composed(group: str, *overrides: str) -> dict[str, Any]:
    """A data group's config; overrides are of its init_args."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+data={group}"]).data
    OmegaConf.set_struct(config, False)
    config.init_args.merge_with_dotlist(list(overrides))
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return plain


def build(group: str, data: Path, *overrides: str) -> CO3DDataModule:
    """As the command line does: composed by Hydra, checked and built by jsonargparse."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    small = VGGT if "vggt" in group else SMALL
    config = parser.parse_object({"data": composed(group, f"data={data}", *small, *overrides)})
    return parser.instantiate_classes(config).data


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 2 categories x 3 sequences x 34 frames of 24 pixels, as the two commands of the docs make it."""
    folder = tmp_path_factory.mktemp("co3d")
    tree, out = str(folder / "tree"), str(folder / "set")
    sizes = ["--categories", "apple", "cup", "--sequences", "3", "--frames", "34", "--size", "24", "--workers", "1"]
    assert main(["toy", "--out", tree, *sizes]) == 0
    assert main(["co3d", "--src", tree, "--out", out, "--workers", "1"]) == 0
    return folder / "set"


def test_every_stage_of_cut3r_holds_its_published_values() -> None:
    for name, expected in CUT3R.items():
        values = composed(f"co3d_cut3r_{name}")["init_args"]
        shape, sampler = values["shape"]["init_args"], values["sampler"]["init_args"]
        found = (
            values["epoch_length"], shape["views"], shape.get("vary_views", False), shape["scenes"],
            len(shape["sizes"]), sampler.get("allow_repeat", False),
        )  # fmt: skip
        assert found == expected, name
        assert (sampler["min_interval"], sampler["max_interval"], sampler["video_prob"]) == (1, 25, 0.5), name
        size = [384, 512] if name.startswith("dpt") else [224, 224]
        assert (values["val_shape"]["views"], values["val_shape"]["size"]) == (4, size), name
        assert values.get("num_workers", 8) == {"d": 4, "l": 16}.get(name[0], 8), name
    assert {f"co3d_cut3r_{name}" for name in CUT3R} == {group for group in GROUPS if group.startswith("co3d_cut3r_")}


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_reads_a_batch_of_its_shape(group: str, packed: Path) -> None:
    module = build(group, packed)
    module.setup("fit")
    (batch,) = islice(module.train_dataloader(), 1)
    shape = module.shape
    scenes, views, channels, height, width = batch.images.shape
    assert channels == 3 and len(batch.keys) == scenes and bool(batch.valid.all())
    if "vggt" in group:
        assert 2 <= views <= 24 and width == 518 and height % 14 == 0 and scenes == max(1, 48 // views)
    else:
        sizes = {tuple(size) for size in getattr(shape, "sizes", [getattr(shape, "size", None)])}
        least = 4 if getattr(shape, "vary_views", False) else getattr(shape, "min_views", None) or shape.max_views
        assert (height, width) in sizes and scenes == 2 and least <= views <= shape.max_views
    side = module.transform.depth_size if hasattr(module.transform, "depth_size") else None
    assert batch.depth.shape == (scenes, views, *((side, side) if side else (height, width)))
    held_out = next(iter(module.val_dataloader()))
    assert held_out.images.shape[:2] == (1, module.val_shape.views) and bool(held_out.valid_depth.any())


@pytest.mark.parametrize("group", ["co3d_diffusionsfm", "co3d_cut3r", "co3d_vggt"])
def test_two_epochs_of_each_familys_sampler_read_from_a_fresh_set(group: str, packed: Path) -> None:
    vggt = ["steps_per_epoch=2", "shape.init_args.max_img_per_gpu=4"]
    module = build(group, packed, *(vggt if "vggt" in group else ["epoch_length=4"]))
    module.setup("fit")
    loader = module.train_dataloader()
    epochs = [list(_ready(module, loader)) for _ in range(2)]
    loader.close()
    assert [len(epoch) for epoch in epochs] == [2, 2]
    for batch in epochs[0] + epochs[1]:
        assert batch.images.dtype == torch.float32 and bool(batch.images.isfinite().all())
        assert bool((batch.depth[batch.valid_depth] > 0).all()) and bool(batch.intrinsics.isfinite().all())
    assert not torch.equal(epochs[0][0].images, epochs[1][0].images)


def _ready(module: CO3DDataModule, loader: Any) -> Iterator[MultiViewBatch]:
    for batch in loader:
        yield module.on_after_batch_transfer(batch, 0)
