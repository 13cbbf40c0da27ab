"""Small image trees, shard sets, sources and a web server with faults, for the tests of the data layer."""

from __future__ import annotations

import functools
import gc
import http.server
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from restrike.data.catalogue import Catalogue
from restrike.data.decode import DecodeError
from restrike.data.source import BadSampleError
from restrike.data_prep.imagenet import prepare_imagenet
from restrike.data_prep.pack import PackOptions

JPEGS = Path(__file__).parent / "data" / "jpegs"


def picture(number: int, size: int = 16, kind: str = "JPEG") -> bytes:
    """A small noisy image that differs from number to number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def read_with_webdataset(folder: Path, pattern: str, decode: bool = False) -> list[dict[str, Any]]:
    """Samples of all matching shards, by the stock reader (which leaves its files open)."""
    urls = [str(path) for path in sorted(folder.glob(pattern))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        reader = webdataset.WebDataset(urls, shardshuffle=False)
        samples = list(reader.decode("rgb8") if decode else reader)
        del reader
        gc.collect()
    return samples


def write_tree(root: Path, train: int = 20, val: int = 7, classes: tuple[str, ...] = ("cat", "dog", "emu")) -> Path:
    """`train` and `val` images, dealt to the classes in turn."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            folder = root / split / classes[number % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{split}_{number:04d}.JPEG").write_bytes(picture(number + 1000 * (split == "val")))
    return root


def write_set(root: Path, train: int = 20, val: int = 7, shards: tuple[int, int] = (3, 2), **options: Any) -> Catalogue:
    """A prepared set in `root`, from a tree in `root/images`."""
    tree = write_tree(root / "images", train, val)
    counts = {"train": shards[0], "validation": shards[1]}
    return prepare_imagenet(tree, root, PackOptions(name="toy", shards=counts, **options))


class NumberedSource:
    """`count` samples whose bytes are their number; some are bad. Picklable, for workers of any kind."""

    def __init__(self, count: int, bad: tuple[int, ...] = (), shards: int = 1) -> None:
        self.class_names = [str(label) for label in range(4)]
        self.labels = np.arange(count, dtype=np.int32) % 4
        self.shard_sizes = np.array([len(part) for part in np.array_split(np.arange(count), shards)])
        self.window, self.fingerprint, self.bad = 0, f"{count}", bad

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, sample: int) -> str:
        return f"sample{sample}"

    def place(self, sample: int) -> str:
        return "a source of numbers"

    def read(self, sample: int) -> bytes:
        if sample in self.bad:
            raise BadSampleError("made bad for the test")
        return str(sample).encode()

    def will_read(self, samples: np.ndarray) -> list[Any]:
        return []


def number_image(data: bytes, rng: np.random.Generator | None = None) -> Tensor:
    """A 2 x 2 picture of a number (three base-256 digits), with one random pixel where a generator is given."""
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    for channel in range(3):
        image[channel] = (int(data) >> 8 * channel) & 0xFF
    if rng is not None:
        image[:, 0, 0] = torch.from_numpy(rng.integers(0, 256, 3, dtype=np.uint8))
    return image


def refuse_odd(data: bytes, rng: np.random.Generator | None = None) -> Tensor:
    """As `number_image`, but odd numbers do not decode."""
    if int(data) % 2:
        raise DecodeError("odd")
    return number_image(data, rng)


def mix_with_draw(images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Soft targets that show what the mixing generator drew."""
    return images, torch.nn.functional.one_hot(labels, 4).float() * float(rng.random())


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files with Range support; `faults` may answer first (returns True when it did)."""

    faults: Callable[[_Handler], bool] | None = None

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        if self.server.faults(self):  # type: ignore[attr-defined]
            return
        self.send_file()

    def send_file(self, announce_extra: int = 0, cut: int | None = None) -> None:
        """The file, or the Range of it; `cut` bytes of that, or announced longer than it is."""
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        header = self.headers.get("Range")
        first, _, last = header.removeprefix("bytes=").partition("-") if header else ("0", "", "")
        start, end = int(first), int(last) + 1 if last else len(data)
        self.send_response(206 if header else 200)
        if header:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start + announce_extra))
        self.end_headers()
        self.wfile.write(data[start : end if cut is None else start + cut])

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serve(folder: Path, faults: Callable[[Any], bool] = lambda handler: False) -> Iterator[Any]:
    """A loopback server of a folder; yields an object with `url` and `requests`."""
    handler = functools.partial(_Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.requests, server.faults = [], faults  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
