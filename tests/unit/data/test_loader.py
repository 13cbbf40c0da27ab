"""Loaders: the same batches for any workers and any start method, from any step, without touching global state."""

from __future__ import annotations

import itertools
import queue
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from restrike.data.loader import TrainLoader, WorkerOptions, create_eval_loader, create_train_loader
from restrike.data.opener import FetchError
from restrike.data.plan import Position
from restrike.data.shards import ShardFile
from shard_tools import NumberedSource, mix_with_draw, number_image

ALONE = WorkerOptions(num_workers=0)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine's cores


def workers(count, start_method="fork", **options):
    return WorkerOptions(num_workers=count, start_method=start_method, timeout_s=60.0, **options)


def train_loader(options=ALONE, position=Position(0, 0), count=50, batch_size=4, **more) -> TrainLoader:
    return create_train_loader(
        NumberedSource(count, shards=5), number_image, mix_with_draw, batch_size, 11, position=position,
        options=options, lanes=8, **more,
    )  # fmt: skip


def plain(batch):
    """A batch as something to compare with ==."""
    return (batch.images.tolist(), batch.targets.tolist(), batch.valid.tolist(), batch.keys, batch.seed)


def two_epochs(loader):
    return [plain(batch) for _ in range(2) for batch in loader]


@pytest.fixture(scope="module")
def expected():
    """24 batches of two epochs of 12 steps, made in this process."""
    return two_epochs(train_loader())


def test_a_batch_has_the_promised_form():
    batch = next(iter(train_loader()))
    assert batch.images.shape == (4, 3, 2, 2)
    assert batch.images.dtype == torch.uint8
    assert batch.targets.dtype == torch.float32
    assert batch.valid.all()
    assert 0 <= batch.seed < 2**63
    numbers = [int(red) + 256 * int(green) for red, green in batch.images[:, :2, 1, 1]]
    assert batch.keys == [f"sample{number}" for number in numbers]
    assert (batch.targets.argmax(1) == torch.tensor([number % 4 for number in numbers])).all()


def test_no_epoch_repeats_another(expected):
    keys = [key for batch in expected for key in batch[3]]
    assert len(set(keys[:48])) == len(set(keys[48:])) == 48
    assert keys[:48] != keys[48:]
    assert len({batch[4] for batch in expected}) == 24


def test_augmentation_is_new_in_each_epoch(expected):
    drawn = [dict(zip(batch[3], batch[0], strict=True)) for batch in expected]
    first, second = (dict(pair for images in half for pair in images.items()) for half in (drawn[:12], drawn[12:]))
    assert all(first[key] != second[key] for key in first.keys() & second.keys())


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("persistent", [False, True])
def test_batches_do_not_depend_on_the_number_of_workers(expected, count, persistent):
    assert two_epochs(train_loader(workers(count, persistent_workers=persistent))) == expected


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_batches_do_not_depend_on_how_workers_start(expected, start_method):
    assert two_epochs(train_loader(workers(2, start_method))) == expected


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("step", [1, 5, 11])
def test_a_loader_started_at_a_step_goes_on_as_if_never_stopped(expected, count, step):
    loader = train_loader(workers(count) if count else ALONE, Position(0, step))
    assert len(loader) == 12
    assert two_epochs(loader)[: 24 - step] == expected[step:]


def test_the_position_counts_batches_as_they_are_handed_over():
    loader = train_loader(workers(2, prefetch_factor=4))
    positions = []
    for _ in loader:
        positions.append(loader.position)
    assert positions == [Position(0, step) for step in range(1, 12)] + [Position(1, 0)]


@pytest.mark.parametrize("options", [ALONE, workers(2), workers(2, persistent_workers=False)], ids=repr)
def test_an_epoch_that_is_cut_short_goes_on_with_the_very_next_batch(expected, options):
    loader = train_loader(options)
    parts = [plain(batch) for _ in range(6) for batch in itertools.islice(loader, 3)]
    assert parts == expected[:18]


def test_workers_do_not_inherit_a_running_thread_pool():
    """A fork of OpenCV's pool hangs: the loader must stop the pool in this process first."""
    cv2.setNumThreads(4)
    pixels = np.zeros((512, 512, 3), np.uint8)
    cv2.warpAffine(pixels, np.eye(2, 3), (512, 512))  # starts the pool
    assert len(list(train_loader(workers(2)))) == 12
    assert cv2.getNumThreads() == 1


def test_closing_a_loader_ends_its_workers():
    loader = train_loader(workers(2))
    next(iter(loader))
    processes = loader._running._workers
    loader.close()
    assert all(process.exitcode is not None for process in processes)
    assert len(list(loader)) == 12  # and it can be used again


class RemoteSource(NumberedSource):
    """Each ten samples are a remote shard."""

    def will_read(self, samples):
        return [ShardFile(f"http://host/{shard}.tar") for shard in sorted({int(sample) // 10 for sample in samples})]


class Asked:
    """A cache that writes down what it is asked for."""

    def __init__(self) -> None:
        self.locations: queue.Queue[str] = queue.Queue()

    def path(self, location, expected_bytes, expected_sha256):
        self.locations.put(location)
        raise FetchError("the worker that needs it will report")


def test_remote_shards_are_asked_for_ahead_in_the_order_of_their_use():
    cache = Asked()
    source = RemoteSource(2000, shards=200)
    loader = create_train_loader(source, number_image, None, 4, 0, options=ALONE, lanes=1, cache=cache)
    order = [int(sample) // 10 for sample in loader.plan.order(0)]
    expected = [f"http://host/{shard}.tar" for shard in dict.fromkeys(order)]
    batches = iter(loader)
    next(batches)
    ahead = {cache.locations.get(timeout=10) for _ in range(20)}
    assert ahead == set(expected[:20])  # 65 steps of 4 samples reach 26 shards; 20 came, and no others
    assert sum(1 for _ in batches) == 499
    rest = {cache.locations.get(timeout=10) for _ in range(180)}
    assert ahead | rest == set(expected)


def test_a_repeating_loader_begins_again():
    loader = train_loader()
    again = TrainLoader(loader.plan, loader._loader.dataset, ALONE, repeat=True)
    first = [[plain(batch) for batch in itertools.islice(again, 2)] for _ in range(3)]
    assert first[0] == first[1] == first[2]


def test_the_global_random_streams_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    two_epochs(train_loader())
    two_epochs(train_loader(workers(1, persistent_workers=False)))
    assert (torch.rand(1), np.random.rand()) == expected


def test_ranks_share_an_epoch_without_overlap():
    loaders = [train_loader(rank=rank, world_size=3) for rank in range(3)]
    assert [len(loader) for loader in loaders] == [4, 4, 4]
    batches = [[plain(batch) for batch in loader] for loader in loaders]
    keys = [key for rank in batches for batch in rank for key in batch[3]]
    assert len(set(keys)) == 48
    assert len({batch[4] for rank in batches for batch in rank}) == 12  # device seeds differ between ranks


def test_on_other_ranks_the_same_pixels_come_at_the_same_global_step():
    def pixels(world_size):
        loaders = [train_loader(batch_size=12 // world_size, rank=r, world_size=world_size) for r in range(world_size)]
        return [torch.cat([batch.images for batch in step]) for step in zip(*loaders, strict=True)]

    for one, many in zip(pixels(1), pixels(4), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize(("count", "world_size"), [(10, 1), (37, 2), (2, 3), (5, 4)])
def test_evaluation_hands_over_each_sample_once(count, world_size):
    seen, lengths = [], set()
    for rank in range(world_size):
        loader = create_eval_loader(
            NumberedSource(count), number_image, 2, batch_size=4, rank=rank, world_size=world_size, options=ALONE
        )
        batches = list(loader)
        lengths.add((len(loader), len(batches)))
        for batch in batches:
            assert batch.images.shape == (4, 3, 2, 2)
            assert all(key == "" for key, valid in zip(batch.keys, batch.valid, strict=True) if not valid)
            seen += [(key, int(y)) for key, y, valid in zip(*batch[3:0:-2], batch.valid, strict=True) if valid]
    assert len(lengths) == 1
    assert sorted(seen) == sorted((f"sample{number}", number % 4) for number in range(count))


def test_evaluation_does_not_depend_on_workers():
    def batches(options):
        return [plain(b) for b in create_eval_loader(NumberedSource(30), number_image, 2, 4, options=options)]

    assert batches(workers(3)) == batches(ALONE)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux asks the kernel for it")
@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_workers_of_a_killed_process_do_not_outlive_it(start_method):
    program = (
        "import time, torch; from torch.utils.data import DataLoader; from restrike.data.loader import _start_worker\n"
        f"options = dict(worker_init_fn=_start_worker, multiprocessing_context={start_method!r})\n"
        "loader = iter(DataLoader(range(10**6), num_workers=2, **options))\n"
        "next(loader); print(*[worker.pid for worker in loader._workers], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()

    def is_alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(map(is_alive, workers))
