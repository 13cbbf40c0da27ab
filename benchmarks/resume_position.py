"""Time to the first batch after a resume at sample 1,000,000 of 1.28 million: ours against webdataset and LitData.

    python -m benchmarks resume_position

The set is 1,281 names for one and the same shard of 1,000 small JPEGs, so that its 1.28 million samples fit on a disk
and lie in the page cache, which favours whoever reads them. Ours opens the set, reads every index and hands over the
batch at its position. webdataset has no position: it skips what the run has seen, here without decoding it, on one
shard in `SKIP_SHARE`, and its time is that of the skip times `SKIP_SHARE`, as skipping is linear (the first row says
how well). Both then decode a batch of 64. Times are the processor's.
"""

from __future__ import annotations

import io
import itertools
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from benchmarks.harness import Row, Timing, compare, environment, pin_threads, record
from restrike.data.cache import ShardCache
from restrike.data.dataset import DatasetLocation, open_split
from restrike.data.index import build_index, index_path
from restrike.data.loader import WorkerOptions, create_train_loader
from restrike.data.plan import Position
from restrike.data.samples import ImageBatch
from restrike.data.transforms import TrainTransform

COMMAND = "python -m benchmarks resume_position"
PER_SHARD, SHARDS, BATCH, RESUME_AT = 1000, 1281, 64, 1_000_000
SKIP_SHARE = 25


def write_set(folder: Path) -> list[str]:
    """The shard, its index, and symbolic links to both under every name."""
    tar, random = folder / "one.tar", np.random.default_rng(0)
    with tarfile.open(tar, "w") as file:
        for number in range(PER_SHARD):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
            for suffix, content in (("cls", str(number % 10).encode()), ("jpg", buffer.getvalue())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    build_index(tar).save(index_path(tar))
    names = []
    for number in range(SHARDS):
        name = folder / f"x-train-{number:05d}.tar"
        name.symlink_to(tar)
        index_path(name).symlink_to(index_path(tar))
        names.append(str(name))
    return names


def ours(folder: Path, sample: int) -> ImageBatch:
    """Open the set and take the batch that comes after `sample` samples."""
    cache = ShardCache(folder / "cache", 0)
    location = DatasetLocation(str(folder), "shards", 10, {"train": f"x-train-{{00000..{SHARDS - 1:05d}}}.tar"})
    source = open_split(location, "train", cache)
    transform = TrainTransform(32, rand_augment=None)
    position = Position(0, sample // BATCH)
    loader = create_train_loader(
        source, transform, None, BATCH, seed=0, position=position, options=WorkerOptions(num_workers=0)
    )
    return next(iter(loader))


def by_skipping(names: list[str], sample: int) -> list[tuple[Image.Image, int]]:
    """webdataset: read and drop `sample` samples, then decode a batch."""
    shards = webdataset.WebDataset(names, shardshuffle=False, empty_check=False)
    rest = itertools.islice(iter(shards), sample, sample + BATCH)
    return [(Image.open(io.BytesIO(item["jpg"])).convert("RGB"), int(item["cls"])) for item in rest]


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    pin_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = write_set(folder)

        def resumed() -> ImageBatch:
            return ours(folder, RESUME_AT)

        first, again = resumed(), resumed()
        assert first.keys == again.keys and first.images.equal(again.images), "the position is not exact"
        assert len(by_skipping(names, BATCH)) == BATCH
        part = RESUME_AT // SKIP_SHARE
        timing = compare(resumed, lambda: by_skipping(names, part), rounds=7, warmup=1, clock=time.process_time)
        whole = Timing(timing.ours_s, [SKIP_SHARE * peer for peer in timing.peer_s])
        linear = seconds(lambda: by_skipping(names, 3 * part)) / seconds(lambda: by_skipping(names, part))
        at_start = compare(resumed, lambda: ours(folder, 0), rounds=7, warmup=1, clock=time.process_time)
    rows = [
        Row.of(
            whole,
            name="First batch after a resume at sample 1,000,000, against skipping",
            peer_name=f"webdataset {webdataset.__version__}, {part:,} skipped x {SKIP_SHARE}; three times as many "
            f"took {linear:.2f} x as long",
            checked="the same batch twice, bitwise",
            command=COMMAND,
        ),
        Row.of(
            at_start,
            name="First batch after a resume at sample 1,000,000, against sample 0",
            peer_name="ours, at the beginning",
            checked="1.00 is O(1)",
            command=COMMAND,
        ),
    ]
    record(*rows, where=environment("webdataset"))
    print(f"median {statistics.median(timing.ours_s):.2f} s to open {SHARDS} indices and decode {BATCH} images")


if __name__ == "__main__":
    main()
