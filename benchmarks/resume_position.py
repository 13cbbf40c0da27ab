"""Time to the first batch after a resume at sample 1,000,000 of 1.28 million: ours against webdataset and LitData.

    python -m benchmarks resume_position

The set is 1,281 names for one and the same shard of 1,000 small JPEGs, so that its 1.28 million samples fit on a disk
and lie in the page cache, which favours whoever reads them. Ours opens the set, reads every index and hands over the
batch at its position. webdataset has no position: it skips what the run has seen, here without decoding it, on one
shard in `SKIP_SHARE`, and its time is that of the skip times `SKIP_SHARE`, as skipping is linear (the first row says
how well). LitData keeps a position and one small file for all chunks, and shuffles within a chunk; its row is left out
where it is not installed. All three then decode a batch of 64. Times are the processor's.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def write_chunks(folder: Path) -> Path:
    """The same set for LitData: one chunk of the shard's samples under 1,281 names."""
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer, random = BinaryWriter(str(folder), chunk_size=PER_SHARD), np.random.default_rng(0)
    for number in range(PER_SHARD):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
        writer[number] = {"jpg": buffer.getvalue(), "cls": number % 10}
    writer.done()
    writer.merge()
    index = json.loads((folder / "index.json").read_text())
    (only,) = index["chunks"]
    index["chunks"] = [{**only, "filename": f"{number:05d}-{only['filename']}"} for number in range(SHARDS)]
    for chunk in index["chunks"]:
        (folder / chunk["filename"]).symlink_to(folder / only["filename"])
    (folder / "index.json").write_text(json.dumps(index))
    return folder


class LitData:
    """The batch after `sample` samples, by a saved state that says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        loader = self._open()
        next(iter(loader))
        self.state = loader.state_dict()

    def _open(self) -> Any:
        from litdata import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(str(self.folder), shuffle=True, seed=0)
        return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=list)

    def batch(self, sample: int) -> list[tuple[Image.Image, int]]:
        loader, state = self._open(), copy.deepcopy(self.state)
        state["num_samples_yielded"] = sample
        state["dataset"] |= {"num_samples_yielded": sample, "sample_in_epoch": sample}
        loader.load_state_dict(state)
        return [(Image.open(io.BytesIO(item["jpg"])).convert("RGB"), item["cls"]) for item in next(iter(loader))]


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
        rows = []
        if importlib.util.find_spec("litdata"):
            litdata = LitData(write_chunks(folder / "chunks"))
            assert len(litdata.batch(RESUME_AT)) == BATCH
            streamed = compare(resumed, lambda: litdata.batch(RESUME_AT), rounds=7, warmup=1, clock=time.process_time)
            rows.append(
                Row.of(
                    streamed,
                    name="First batch after a resume at sample 1,000,000, against LitData's position",
                    peer_name=f"LitData {version('litdata')}, shuffled within chunks",
                    checked="both give 64 decoded images",
                    command=COMMAND,
                )
            )
        at_start = compare(resumed, lambda: ours(folder, 0), rounds=7, warmup=1, clock=time.process_time)
    rows += [
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
    record(*rows, where=environment("webdataset", "litdata"))
    print(f"median {statistics.median(timing.ours_s):.2f} s to open {SHARDS} indices and decode {BATCH} images")


if __name__ == "__main__":
    main()
