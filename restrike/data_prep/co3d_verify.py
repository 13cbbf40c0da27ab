"""Check a multi-view set against its catalogue, byte by byte, and name the damaged sequences."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from restrike.data.catalogue import CATALOGUE_NAME, ShardEntry
from restrike.data.files import sha256_file
from restrike.data.index import index_path
from restrike.data.multiview_index import MULTIVIEW_FORMAT, SceneIndex, load_multiview_catalogue
from restrike.data_prep.progress import Progress
from restrike.data_prep.verify import pin_down


def is_multiview_set(data: Path) -> bool:
    """Whether a folder's catalogue is one of a multi-view set."""
    path = data / CATALOGUE_NAME
    return path.is_file() and MULTIVIEW_FORMAT.encode() in path.read_bytes()


def verify_multiview(data: Path, workers: int = 1, progress: Progress | None = None) -> list[str]:
    """One sentence for each problem, with the shard, and the sequence where a flipped byte can be pinned down."""
    try:
        catalogue = load_multiview_catalogue((data / CATALOGUE_NAME).read_bytes(), str(data / CATALOGUE_NAME))
    except ValueError as error:
        return [str(error)]
    progress = progress or Progress(catalogue.sequences, "sequences")
    problems: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda entry: _verify_shard(data, entry), catalogue.shards)
        for entry, sentences in zip(catalogue.shards, found, strict=True):
            progress.add(entry.samples)
            problems += sentences
    return problems


def _verify_shard(data: Path, entry: ShardEntry) -> list[str]:
    tar, sidecar = data / entry.name, index_path(data / entry.name)
    if missing := [f"{path.name}: missing" for path in (tar, sidecar) if not path.is_file()]:
        return missing
    if sha256_file(sidecar) != entry.index_sha256:
        return [f"{sidecar.name}: sha256 differs from the catalogue's"]
    if tar.stat().st_size != entry.bytes:
        return [f"{tar.name}: {tar.stat().st_size} bytes, the catalogue says {entry.bytes}"]
    if sha256_file(tar) != entry.sha256:
        return [f"{tar.name}: sha256 differs from the catalogue's{pin_down(tar, SceneIndex.load(sidecar))}"]  # type: ignore[arg-type]
    return []
