"""CO3D scenes to training views, per core: Restrike's loader on packed shards against a plain per-frame reader.

    python -m benchmarks multiview_loader
    python -m benchmarks.multiview_loader --data data/co3d   # two epochs of your own set, for every family's sampler

The peer works as the families' own loaders do: it opens each full-size JPEG with Pillow, each depth map and mask of the
CO3D tree, resizes whole pictures, then crops, and computes rays or points a view at a time. Frames are drawn at 1080
pixels (short side), as CO3D v2 has them, and packed at the profile of each family's recipe. Both take the same crops,
without colours. One process, one thread, CPU seconds. The "full" rows read shards of unchanged pictures: there the
outputs are equal, which is checked first.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Row, compare, environment, pin_threads, record
from restrike import geometry as g
from restrike.data.cache import ShardCache
from restrike.data.multiview_batches import stack_scenes
from restrike.data.multiview_filter import SceneFilter
from restrike.data.multiview_index import SceneIndex
from restrike.data.multiview_source import SceneSource, open_scenes
from restrike.data.multiview_transforms import CUT3RViews, DiffusionSfMViews, VGGTViews
from restrike.data_prep.co3d import SceneOptions, prepare_co3d
from restrike.data_prep.co3d_tree import Sequence, read_category
from restrike.data_prep.toy import ToyOptions, prepare_toy

COMMAND = "python -m benchmarks multiview_loader"
VIEWS, SIDE, CATEGORIES = 8, 1080, ("apple", "cup")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
WHOLE = {"S": 384, "L": 640, "full": SIDE}


class Views(NamedTuple):
    """images [V, 3, H, W], normalised; depth and its validity [V, P, Q]; world points of depth [V, P, Q, 3]."""

    images: Tensor
    depth: Tensor
    valid: Tensor
    points: Tensor


# Ours


def ours(source: SceneSource, transform: Any, size: tuple[int, int], scene: int, seed: int) -> Views:
    """Read and transform 8 views; what follows runs on the whole batch, as on the device in training."""
    raw = source.read(scene, np.arange(VIEWS))
    sample = transform(raw, size, np.zeros(VIEWS, dtype=bool), np.random.default_rng(seed))
    batch = stack_scenes([sample], torch.ones(1, dtype=torch.bool), [source.key(scene)], 0)
    images = batch.images[0].float() / 255 if batch.images.dtype == torch.uint8 else batch.images[0]
    scale = batch.depth.shape[-1] / size[1]
    intrinsics = g.resize_intrinsics(batch.intrinsics[0], scale, scale)
    points = g.unproject_depth(batch.depth[0], intrinsics, g.invert_se3(batch.world_to_camera[0]))
    return Views((images - MEAN) / STD, batch.depth[0], batch.valid_depth[0], points)


# The peer: a view at a time, whole pictures


class Files(NamedTuple):
    """A frame of the tree: picture, depth (float32), depth mask and foreground; its camera in pixels."""

    image: Image.Image
    depth: np.ndarray
    mask: np.ndarray
    foreground: np.ndarray
    intrinsics: np.ndarray
    camera: np.ndarray


def open_frame(root: Path, sequence: Sequence, number: int) -> Files:
    """Each file by Pillow, in full."""
    frame = sequence.frames[number]
    assert frame.depth is not None and frame.depth.mask_path is not None and frame.mask is not None
    with Image.open(root / frame.image.path) as file:
        image = file.convert("RGB")
    with Image.open(root / frame.depth.path) as file:
        depth = np.array(file, dtype=np.uint16).view(np.float16).astype(np.float32).reshape(file.size[::-1])
    depth[~np.isfinite(depth)] = 0
    with Image.open(root / frame.depth.mask_path) as file:
        mask = np.array(file.convert("L")) > 128
    with Image.open(root / frame.mask.path) as file:
        foreground = np.array(file)
    return Files(image, depth, mask, foreground, sequence.intrinsics[number], sequence.world_to_camera[number])


def lift(depth: np.ndarray, intrinsics: np.ndarray, camera: np.ndarray, center: float) -> np.ndarray:
    """World points [P, Q, 3] of one view's depth, in numpy."""
    v, u = np.meshgrid(*(np.arange(side, dtype=np.float32) + center for side in depth.shape), indexing="ij")
    x = (u - intrinsics[0, 2]) * depth / intrinsics[0, 0]
    y = (v - intrinsics[1, 2]) * depth / intrinsics[1, 1]
    points = np.stack([x, y, depth], axis=-1).astype(np.float32)
    rotation, shift = camera[:, :3].astype(np.float32), camera[:, 3].astype(np.float32)
    return (points - shift) @ rotation


def square_view(files: Files, transform: DiffusionSfMViews, size: tuple[int, int], random: Any) -> tuple[Any, ...]:
    """DiffusionSfM's: a square of the picture, resized as float; depth nearest on the coarse grid."""
    box = transform.box(files.depth.shape, random)
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    pixels = torch.from_numpy(np.array(files.image.crop(corners))).permute(2, 0, 1)[None].float() / 255
    image = F.interpolate(pixels, size, mode="bilinear", antialias=True)[0]
    crops = [Image.fromarray(x).crop(corners) for x in (files.depth, files.foreground)]
    grid = [torch.from_numpy(np.array(crop))[None, None] for crop in crops]
    side = transform.depth_size
    depth, _ = (F.interpolate(x, (side, side), mode="nearest-exact")[0, 0].numpy() for x in grid)
    scale = side / box.width
    intrinsics = files.intrinsics.copy()
    intrinsics[:2, 2] -= (box.left, box.top)
    intrinsics[:2] *= scale
    return (image - MEAN) / STD, depth, depth > 0, lift(depth, intrinsics, files.camera, 0.5)


def resized_view(
    files: Files, depth: np.ndarray, first: g.CropBox, plan: Callable[..., Any], center: np.ndarray
) -> tuple[Any, ...]:
    """VGGT's and CUT3R's: a first crop, all of it resized by Lanczos (depth nearest), a second crop."""
    corners = (first.left, first.top, first.left + first.width, first.top + first.height)
    picture = files.image.crop(corners)
    rows, columns = slice(corners[1], corners[3]), slice(corners[0], corners[2])
    intrinsics = torch.from_numpy(files.intrinsics).float()
    intrinsics = g.crop_intrinsics(intrinsics, first.left, first.top)
    resized, box, intrinsics = plan(depth[rows, columns].shape, intrinsics)
    kind = Image.Resampling.LANCZOS if resized[0] < picture.height else Image.Resampling.BICUBIC
    pixels = np.array(picture.resize(resized[::-1], kind))
    small, _ = (
        cv2.resize(x[rows, columns], resized[::-1], interpolation=cv2.INTER_NEAREST) for x in (depth, files.foreground)
    )
    kept = (slice(box.top, box.top + box.height), slice(box.left, box.left + box.width))
    image = torch.from_numpy(np.ascontiguousarray(pixels[kept])).permute(2, 0, 1).float() / 255
    small = np.ascontiguousarray(small[kept])
    points = lift(small, intrinsics.numpy(), files.camera, float(center))
    return (image - MEAN) / STD, small, small > 1e-8, points


def wide_view(files: Files, transform: VGGTViews, size: tuple[int, int], random: Any) -> tuple[Any, ...]:
    """VGGT's."""
    depth = np.where(files.mask, files.depth, 0)
    depth = np.where(depth > np.percentile(depth, transform.depth_percentile), 0, depth).astype(np.float32)
    factors = np.minimum(random.uniform(*transform.scale, 2), 1.0)
    part = (int(depth.shape[0] * factors[0]), int(depth.shape[1] * factors[1]))
    center = (float(np.float32(files.intrinsics[0, 2])), float(np.float32(files.intrinsics[1, 2])))

    def plan(shape: tuple[int, int], intrinsics: Tensor) -> tuple[Any, ...]:
        extra = float(random.triangular(0, 0, transform.max_extra)) * max(size)
        resized, scale = g.covering_size(shape, size, 4 + extra)
        intrinsics = g.resize_intrinsics(intrinsics, scale, scale, g.OPENCV_PIXEL_CENTER)
        place = (float(intrinsics[0, 2]), float(intrinsics[1, 2]))
        box = g.principal_point_crop(resized, place, size, strict=True)
        return resized, box, g.crop_intrinsics(intrinsics, box.left, box.top)

    first = g.principal_point_crop(depth.shape, center, part, strict=False)
    return resized_view(files, depth, first, plan, np.float64(g.OPENCV_PIXEL_CENTER))


def covering_view(files: Files, transform: CUT3RViews, size: tuple[int, int], random: Any) -> tuple[Any, ...]:
    """CUT3R's."""
    center = (float(np.float32(files.intrinsics[0, 2])), float(np.float32(files.intrinsics[1, 2])))

    def plan(shape: tuple[int, int], intrinsics: Tensor) -> tuple[Any, ...]:
        extra = int(random.integers(0, transform.aug_crop))
        crop = g.covering_crop(shape, intrinsics, size, extra, g.OPENCV_PIXEL_CENTER)
        return crop.resized, crop.box, crop.intrinsics

    first = g.symmetric_crop(files.depth.shape, center)
    return resized_view(files, files.depth, first, plan, np.float64(g.OPENCV_PIXEL_CENTER))


def peer(root: Path, sequence: Sequence, view: Callable[..., Any], transform: Any, size: Any, seed: int) -> Views:
    random = np.random.default_rng(seed)
    if isinstance(transform, CUT3RViews):
        random.random()  # whether to keep the object's depth alone
    rows = [view(open_frame(root, sequence, number), transform, size, random) for number in range(VIEWS)]
    images, *others = zip(*rows, strict=True)
    return Views(torch.stack(images), *(torch.from_numpy(np.stack(other)) for other in others))


FAMILIES: tuple[tuple[str, str, tuple[int, int], Any, Callable[..., Any]], ...] = (
    ("DiffusionSfM 224, rays 16 x 16", "S", (224, 224), DiffusionSfMViews(), square_view),
    ("CUT3R 512 x 384", "L", (384, 512), CUT3RViews(background_prob=0), covering_view),
    ("VGGT 518 x 350", "L", (350, 518), VGGTViews(), wide_view),
)


def check(found: Views, wanted: Views) -> str:
    """Equal pictures, depth, validity and points; in words. AssertionError otherwise."""
    assert torch.equal(found.valid, wanted.valid), "other pixels have depth: nothing was timed"
    levels = ((found.images - wanted.images) * STD * 255).abs()
    worst, share = float(levels.max()), float((levels > 0.01).float().mean())
    points = float((found.points - wanted.points)[found.valid].norm() / wanted.points[found.valid].norm())
    assert torch.equal(found.depth[found.valid], wanted.depth[found.valid]), "depth differs: nothing was timed"
    assert worst < 2.01 and share < 1e-3 and points < 1e-5, f"{worst=} {share=} {points=}: nothing was timed"
    return f"on full pictures: depth equal, points within {points:.0e}, a level or two in {share:.0e} of the values"


def measure(folder: Path, rounds: int) -> list[Row]:
    tree = folder / "tree"
    sequences = [s for name in CATEGORIES for s in read_category(tree, name).sequences.values()]
    rows = []
    for name, profile, size, transform, view in FAMILIES:
        checked = ""
        for kind in ("full", profile):
            cache = ShardCache(folder / kind)
            source = open_scenes(str(folder / kind), cache, SceneFilter(min_quality=None, require_depth=False))
            assert source.sequences == [sequence.name for sequence in sequences]
            if kind == "full":
                pairs = [
                    (ours(source, transform, size, k, k), peer(tree, s, view, transform, size, k))
                    for k, s in enumerate(sequences)
                ]
                checked = [check(*pair) for pair in pairs][-1]
            turns = itertools.count()
            others = itertools.count()
            timing = compare(
                lambda s=source, t=transform, z=size, n=turns: ours(s, t, z, next(n) % len(s), 0),
                lambda v=view, t=transform, z=size, n=others: peer(
                    tree, sequences[next(n) % len(sequences)], v, t, z, 0
                ),
                rounds=rounds,
                min_round_s=0.5,
                warmup=len(sequences),
                clock=time.process_time,
            )
            label = f"CO3D scene of {VIEWS} views, {name}, shards of {WHOLE[kind]} px ({kind})"
            peer_name = f"per-frame reader of a tree of {SIDE} px"
            row = Row.of(timing, name=label, peer_name=peer_name, checked=checked, command=COMMAND, items=1)
            print(f"{row.name}: {row.ratio} ({row.spread}), {row.ours} against {row.peer}", flush=True)
            rows.append(row)
    return rows


def read_amplification(folder: Path) -> Row:
    """Bytes read over bytes used, for 8 frames of a sequence of 160."""
    prepare_toy(folder / "long", ToyOptions(categories=("apple",), sequences=1, frames=160, size=384))
    prepare_co3d(folder / "long", folder / "long_set", SceneOptions(profile="S"))
    index = SceneIndex.load(folder / "long_set" / "co3d-apple-0000.idx")
    drawn = np.random.default_rng(0).choice(160, VIEWS, replace=False)
    used = int(index.lengths[drawn].sum())
    read = int((index.offsets[drawn, 2] + index.lengths[drawn, 2] - index.offsets[drawn, 0]).sum())
    return Row(
        name=f"CO3D read amplification, {VIEWS} of 160 frames",
        ratio=f"**{index.tar_bytes / read:.1f}×**",
        ours=f"{read / used:.3f} bytes read per byte used",
        peer=f"{index.tar_bytes / used:.1f} (a streamed sequence)",
        command=f"`{COMMAND}`",
    )


def read_epochs(data: str, samples: int, workers: int) -> None:
    """Print scenes and views a second of two epochs, as every family's data group reads the set."""
    from hydra import compose, initialize_config_dir
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule
    from omegaconf import OmegaConf

    for family in ("diffusionsfm", "cut3r", "vggt"):
        with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "conf"), version_base="1.3"):
            group: Any = OmegaConf.to_container(compose(overrides=[f"+data=co3d_{family}"]).data)
        length = {"steps_per_epoch": max(1, samples // 8)} if family == "vggt" else {"epoch_length": samples}
        group["init_args"] |= {"data": data, "num_workers": workers, "pin_memory": False, **length}
        parser = ArgumentParser()
        parser.add_subclass_arguments(LightningDataModule, "data")
        module = parser.instantiate_classes(parser.parse_object({"data": group})).data
        module.setup("fit")
        loader = module.train_dataloader()
        for epoch in range(2):
            start, scenes, views = time.perf_counter(), 0, 0
            for batch in loader:
                scenes, views = scenes + len(batch.keys), views + batch.frame_numbers.numel()
            seconds = time.perf_counter() - start
            print(
                f"{family}, epoch {epoch}: {scenes / seconds:.1f} scenes/s, {views / seconds:.0f} views/s", flush=True
            )
        loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small pictures; prints, records nothing")
    parser.add_argument("--data", help="a prepared set: read two epochs of it instead")
    parser.add_argument("--samples", type=int, default=64, help="of an epoch, with --data")
    parser.add_argument("--workers", type=int, default=0, help="with --data")
    arguments = parser.parse_args()
    if arguments.data:
        read_epochs(arguments.data, arguments.samples, arguments.workers)
        return
    pin_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side = SIDE // 4 if arguments.quick else SIDE
        prepare_toy(folder / "tree", ToyOptions(categories=CATEGORIES, sequences=2, frames=VIEWS, size=side))
        for profile in WHOLE:
            prepare_co3d(folder / "tree", folder / profile, SceneOptions(profile=profile))
        where = environment("pillow", "simplejpeg", "opencv-python-headless")
        rows = [*measure(folder, rounds=7), read_amplification(folder)]
    if not arguments.quick:
        record(*rows, where=f"{where}; 1 thread")


if __name__ == "__main__":
    main()
