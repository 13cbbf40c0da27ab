"""Images on disk to augmented uint8 batches, per core: Restrike's shard loader against what else one would use.

    python -m benchmarks loader
    python -m benchmarks.loader --quick

Everything runs in one process with one thread and is timed in CPU seconds, all loaders in turn, so the figures are what
one loader worker does. Images are 500 x 375 tiles (JPEG, quality 90, 4:2:0) cut from the photographs that
`prepare photos` ships. All peers augment by timm's own transforms. "full" is FasterViT's training augmentation up to
the batch (RandomResizedCrop, flip, RandAugment), "light" leaves RandAugment out, "full + mixing" adds mixup and CutMix.
Random erasing comes after the batch, on the device, in ours as in timm's; torchvision's loader has it in its transform.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import litdata
import numpy as np
import torch
import webdataset
from PIL import Image
from timm.data import ImageDataset, create_loader, create_transform
from timm.data.mixup import FastCollateMixup
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import restrike.data_prep
from benchmarks.harness import Row, Timing, environment, pin_threads, record, time_in_turn
from restrike.data import native
from restrike.data.cache import ShardCache
from restrike.data.catalogue import load_catalogue
from restrike.data.crops import sample_crop
from restrike.data.loader import WorkerOptions, create_train_loader
from restrike.data.mixing import Mixing
from restrike.data.native.build import BuildError, build
from restrike.data.shards import load_indices, shards_of_split
from restrike.data.source import ShardSource
from restrike.data.transforms import TrainTransform
from restrike.data_prep.imagenet import prepare_imagenet
from restrike.data_prep.pack import PackOptions

COMMAND = "python -m benchmarks loader"
PHOTOS = Path(restrike.data_prep.__file__).with_name("assets") / "photos"
IMAGE_SIZE, BATCH, NUM_TILES = 224, 64, 512
RECIPE = "rand-m9-mstd0.5-inc1"
# timm with Pillow 13 stops at Posterize to 0 bits, which level 10 asks for once in 645 images: keep it under 10.
PEER_RECIPE = RECIPE + "-mmax9"

Call = Callable[[], object]


def make_tiles(root: Path, count: int) -> float:
    """Write an ImageFolder tree of `count` training tiles, one class a photo; returns their mean kilobytes."""
    rng = np.random.default_rng(0)
    photos = sorted(PHOTOS.glob("*.jpg"))
    sizes = []
    for number in range(count + len(photos)):
        photo = photos[number % len(photos)]
        with Image.open(photo) as image:
            share = rng.uniform(0.6, 1.0)
            width, height = (math.floor(side * math.sqrt(share)) for side in image.size)
            left, top = (
                int(rng.integers(full - part + 1)) for full, part in zip(image.size, (width, height), strict=True)
            )
            tile = image.convert("RGB").crop((left, top, left + width, top + height))
        tile = tile.resize((375, 500) if height > width else (500, 375), Image.Resampling.BICUBIC)
        folder = root / ("train" if number < count else "val") / photo.stem
        folder.mkdir(parents=True, exist_ok=True)
        tile.save(folder / f"{number:04d}.jpg", "JPEG", quality=90, subsampling="4:2:0")
        sizes.append((folder / f"{number:04d}.jpg").stat().st_size)
    return float(np.mean(sizes)) / 1e3


def endless(loader: Iterable[object]) -> Call:
    """A call that takes the next batch, epoch after epoch."""
    batches = itertools.chain.from_iterable(loader for _ in itertools.count())
    return lambda: next(batches)


def ours(shards: Path, policy: str | None, use_native: bool, mix: bool = False) -> Call:
    files = shards_of_split(str(shards), load_catalogue(shards / "catalogue.json"), "train")
    cache = ShardCache(shards / "cache")
    names = sorted(path.stem for path in PHOTOS.glob("*.jpg"))
    source = ShardSource(files, load_indices(files, cache), names, cache)
    transform = TrainTransform(IMAGE_SIZE, rand_augment=policy, native="on" if use_native else "off")
    mixing = Mixing(len(names)) if mix else None
    return endless(create_train_loader(source, transform, mixing, BATCH, 0, options=WorkerOptions(num_workers=0)))


def peer_transform(policy: str | None, float_out: bool) -> Callable[[Image.Image], Tensor]:
    return create_transform(
        IMAGE_SIZE,
        is_training=True,
        color_jitter=None,
        auto_augment=policy,
        interpolation="random",
        re_prob=0.25 if float_out else 0,
        re_mode="pixel",
        use_prefetcher=not float_out,
    )


def timm_loader(tree: Path, policy: str | None, mix: bool = False) -> Call:
    """timm's loader up to the uint8 batch, which its prefetcher would then normalise on the device."""
    loader = create_loader(
        ImageDataset(str(tree / "train")),
        IMAGE_SIZE,
        BATCH,
        is_training=True,
        color_jitter=None,
        auto_augment=policy,
        interpolation="random",
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
        collate_fn=FastCollateMixup(0.8, 1.0, num_classes=16) if mix else None,
    )
    return endless(loader.loader)


def image_folder(tree: Path, policy: str | None) -> Call:
    """torchvision's ImageFolder and a plain DataLoader: normalised (and erased) float images."""
    dataset = ImageFolder(str(tree / "train"), peer_transform(policy, float_out=True))
    return endless(DataLoader(dataset, BATCH, shuffle=True, drop_last=True))


def plain_webdataset(shards: Path, policy: str | None) -> Call:
    transform = peer_transform(policy, float_out=False)
    urls = [str(path) for path in sorted(shards.glob("*-train-*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=8).shuffle(200).decode("pil").to_tuple("jpg", "cls")
    return endless(DataLoader(dataset.map_tuple(transform).batched(BATCH, partial=False), batch_size=None))


def litdata_sample(path: Path) -> dict[str, object]:
    return {"image": path.read_bytes(), "label": path.parent.name}


def optimise_for_litdata(tree: Path, chunks: Path) -> None:
    """LitData's own format: chunks of up to 64 MB, images as JPEG."""
    paths = sorted((tree / "train").rglob("*.jpg"))
    litdata.optimize(litdata_sample, paths, str(chunks), chunk_bytes="64MB", num_workers=1, start_method="fork")


def litdata_loader(chunks: Path, policy: str | None) -> Call:
    transform = peer_transform(policy, float_out=False)

    def decode(sample: dict[str, bytes]) -> tuple[Tensor, str]:
        return transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]  # type: ignore[return-value]

    dataset = litdata.StreamingDataset(str(chunks), shuffle=True, transform=decode, drop_last=True)
    return endless(litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0))


def check_pixels(tree: Path) -> str:
    """The same crops by ours and by Pillow, before anything is timed; what was found, in words."""
    plain = TrainTransform(IMAGE_SIZE, native="off", hflip=0, interpolation="bicubic")
    errors = []
    for number, path in enumerate(sorted((tree / "train").rglob("*.jpg"))[:64]):
        data = path.read_bytes()
        image = plain(data, np.random.default_rng(number)).permute(1, 2, 0).numpy()
        if native.is_available():
            region = TrainTransform(IMAGE_SIZE, native="on", hflip=0, interpolation="bicubic")
            assert np.array_equal(region(data, np.random.default_rng(number)).permute(1, 2, 0).numpy(), image), path
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        box = sample_crop(*pixels.shape[:2], plain.scale, plain.ratio, np.random.default_rng(number))
        crop = Image.fromarray(pixels).crop((box.left, box.top, box.left + box.width, box.top + box.height))
        wanted = np.asarray(crop.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
        errors.append(np.mean((image.astype(float) - wanted) ** 2))
    psnr = 10 * math.log10(255**2 / float(np.mean(errors)))
    assert psnr > 60, f"crops are {psnr:.1f} dB from Pillow's: nothing was timed"
    return f"crops {psnr:.0f} dB from Pillow's"


def measure(folder: Path, checked: str, rounds: int) -> list[Row]:
    tree, shards, chunks = folder / "tree", folder / "shards", folder / "chunks"
    variants = {"wheels only": False} | ({"with the C extension": True} if native.is_available() else {})
    rows = []
    for workload, policy, peer_policy in (("full", RECIPE, PEER_RECIPE), ("light", None, None)):
        forms = {variant: ours(shards, policy, use_native) for variant, use_native in variants.items()}
        peers = {
            "timm create_loader": timm_loader(tree, peer_policy),
            "ImageFolder + DataLoader, float": image_folder(tree, peer_policy),
            "webdataset + Pillow": plain_webdataset(shards, peer_policy),
            "LitData": litdata_loader(chunks, peer_policy),
        }
        rows += compare_all(workload, forms, peers, checked, rounds)
    forms = {variant: ours(shards, RECIPE, use_native, mix=True) for variant, use_native in variants.items()}
    peers = {"timm create_loader": timm_loader(tree, PEER_RECIPE, mix=True)}
    return rows + compare_all("full + mixing", forms, peers, checked, rounds)


def compare_all(workload: str, forms: dict[str, Call], peers: dict[str, Call], checked: str, rounds: int) -> list[Row]:
    """A row for each form of ours and each peer."""
    times = time_in_turn({**peers, **forms}, rounds, clock=time.process_time)
    return [
        make_row(f"Loader, {workload}, {form}, {peer}", peer, Timing(times[form], times[peer]), checked)
        for form in forms
        for peer in peers
    ]


def make_row(name: str, peer_name: str, timing: Timing, checked: str) -> Row:
    row = Row.of(timing, name=name, peer_name=peer_name, checked=checked, command=COMMAND, items=BATCH)
    print(f"{row.name}: {row.ratio} ({row.spread}), {row.ours} against {row.peer}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tiles and rounds; prints, records nothing")
    arguments = parser.parse_args()
    pin_threads(1)
    cv2.setNumThreads(1)
    try:
        build()
    except BuildError as error:
        print(f"without the C extension's rows: {error}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kilobytes = make_tiles(folder / "tree", 4 * BATCH if arguments.quick else NUM_TILES)
        prepare_imagenet(folder / "tree", folder / "shards", PackOptions("tiles", {"train": 8, "validation": 1}))
        optimise_for_litdata(folder / "tree", folder / "chunks")
        checked = check_pixels(folder / "tree")
        print(f"{environment('timm', 'pillow', 'simplejpeg', 'webdataset')}; tiles of {kilobytes:.0f} kB; {checked}")
        rows = measure(folder, checked, rounds=7 if arguments.quick else 11)
    if not arguments.quick:
        record(*rows, where=environment("timm", "torchvision", "pillow", "simplejpeg", "webdataset", "litdata"))


if __name__ == "__main__":
    main()
