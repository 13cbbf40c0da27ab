"""A 1 GB checkpoint: time and extra memory of an atomic, durable, checksummed save, and what else one would do.

    python -m benchmarks checkpoint

Peers: the raw write of as many bytes with fsync, Lightning's own atomic save without and with fsync, and torch.save,
which leaves the bytes in the page cache. All get two cores; ours computes its digest on the second.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from benchmarks.harness import Row, compare, environment, pin_threads, record
from restrike.checkpoints import atomic
from restrike.checkpoints.manifest import verify

COMMAND = "python -m benchmarks checkpoint"
TENSORS, FLOATS = 64, 4_000_000  # 1.02 GB
CHECKED = "read back bitwise, SHA-256 verified"


def resident_mb() -> float:
    """Memory of this process in RAM, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def extra_memory_mb(save: Callable[[], object]) -> float:
    """How far the process's memory rises above where it was while `save` runs, MB (sampled every 2 ms)."""
    before, peak, done = resident_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_mb())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    save()
    done.set()
    watcher.join()
    return max(0.0, peak - before)


def main() -> None:
    """Measure and record."""
    pin_threads(2)
    torch.set_num_threads(1)
    content = {f"layer{i}": torch.randn(FLOATS) for i in range(TENSORS)}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR", ".")) as folder:
        ours, lightning, plain, raw = (Path(folder) / f"{name}.ckpt" for name in ("ours", "lightning", "plain", "raw"))
        io = TorchCheckpointIO()

        def save_ours() -> None:
            atomic.save(content, ours, keep_previous=False)

        def write_raw() -> None:
            with open(raw, "wb") as stream:
                for tensor in content.values():
                    stream.write(memoryview(tensor.numpy()))  # type: ignore[arg-type]
                stream.flush()
                os.fsync(stream.fileno())

        def save_lightning() -> None:
            io.save_checkpoint(content, str(lightning))

        def save_lightning_durably() -> None:
            save_lightning()
            with open(lightning, "rb") as stream:
                os.fsync(stream.fileno())

        save_ours()
        verify(ours)
        loaded = torch.load(ours, weights_only=True)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in content.items())
        del loaded

        peers = {
            "a raw write + fsync": write_raw,
            "Lightning 2.6 atomic save": save_lightning,
            "Lightning 2.6 atomic save + fsync": save_lightning_durably,
            "plain torch.save": lambda: torch.save(content, plain),
        }
        memory, where = extra_memory_mb(save_ours), environment("lightning")
        of_peers = {name: extra_memory_mb(save) for name, save in peers.items()}
        peer = ", ".join(f"{megabytes:,.0f} MB ({name})" for name, megabytes in of_peers.items())
        command = f"`{COMMAND}`"
        record(Row("Save of 1 GB, extra memory", f"{memory:.0f} MB", command, peer=peer, checked=CHECKED), where=where)
        for name, save in peers.items():
            timing = compare(save_ours, save, rounds=7, warmup=1)
            title = f"Save of 1 GB against {name}"
            record(Row.of(timing, name=title, peer_name=name, checked=CHECKED, command=COMMAND), where=where)


if __name__ == "__main__":
    main()
