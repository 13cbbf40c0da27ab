"""Evaluation sets of several views in their genuine layouts, each by its own protocol, for `test` and `validate`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lightning.pytorch import LightningDataModule

from datamodules.base import Triple
from datamodules.co3d import normalize_views
from restrike.data.decode import MAX_PIXELS, DecodeError
from restrike.data.evaluation_sets import PROTOCOLS, ViewProtocolName, ViewSequence, ViewSet, open_view_set
from restrike.data.photo_views import PhotoTransform, PhotoView, views_batch
from restrike.data.photos import open_photo
from restrike.data.samples import MultiViewBatch

_AHEAD = 2  # batches that are read while the network works on another


class EvaluationViewsDataModule(LightningDataModule):
    """The sequences of one protocol as batches of one scene, in order; cameras and depth in the batches are unknown
    (NaN and 0). With callbacks.view_benchmark, which reads the truth of each frame and scores what the network says.

    A network that streams gets a sequence view by view, so that its length costs no memory; any other gets it whole. A
    batch begins a sequence where its first `frame_numbers` is 0. Its keys are `image` of the frames. Ranks share
    the sequences, each taking every n-th.

    Args:
        root: Folder of the set, in its genuine layout (docs/evaluation.md).
        transform: How the family loads a picture (`restrike.data.photo_views`); where depth is scored, its `for_depth`.
        protocol: Of `restrike.data.evaluation_sets.PROTOCOLS`.
        mean: Of the channels, in [0, 1].
        std: Of the channels.
        is_streaming: The network sees one view after another and keeps what it knows itself.
        max_pixels: Larger pictures end the run.
        num_threads: Threads that decode.
    """

    only_evaluates = True

    def __init__(
        self,
        root: str,
        transform: PhotoTransform,
        protocol: ViewProtocolName,
        mean: Triple = (0.0, 0.0, 0.0),
        std: Triple = (1.0, 1.0, 1.0),
        is_streaming: bool = False,
        max_pixels: int = MAX_PIXELS,
        num_threads: int = 4,
    ) -> None:
        super().__init__()
        if num_threads < 1:
            raise ValueError(f"data.num_threads: expected 1 or more, got {num_threads}")
        for_depth = getattr(transform, "for_depth", None) if PROTOCOLS[protocol].is_depth else None
        self.transform = transform if for_depth is None else for_depth()
        self.root, self.protocol = Path(root).expanduser(), protocol
        self.mean, self.std, self.is_streaming = tuple(mean), tuple(std), is_streaming
        self.max_pixels, self.num_threads = max_pixels, num_threads
        self.view_set: ViewSet | None = None

    def setup(self, stage: str) -> None:
        """List the frames, once.

        Raises:
            ValueError: the folder is not in the layout of the set, or the stage is another than evaluation.
        """
        if stage not in ("validate", "test"):
            raise ValueError(f"data.protocol: {self.protocol} is for test and validate only")
        self.view_set = self.view_set or open_view_set(self.protocol, self.root)

    @property
    def evaluation_frames(self) -> str:
        """Protocol, number of frames and hash of their list, for beside a number."""
        assert self.view_set is not None, "setup comes first"
        return self.view_set.description

    @property
    def own_sequences(self) -> Sequence[ViewSequence]:
        """Those of this rank, in the order of the batches."""
        assert self.view_set is not None, "setup comes first"
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self.view_set.sequences[rank::world_size]

    def test_dataloader(self) -> _SequenceBatches:
        """Each sequence once over all ranks."""
        return _SequenceBatches(self, self.own_sequences)

    def val_dataloader(self) -> _SequenceBatches:
        """The same."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: MultiViewBatch, dataloader_idx: int) -> MultiViewBatch:
        """Normalise."""
        return batch._replace(images=normalize_views(batch.images, self.mean, self.std))

    def load(self, image: str) -> PhotoView:
        """One picture.

        Raises:
            ValueError: it cannot be read; an evaluation leaves no frame out.
        """
        try:
            return self.transform(open_photo(self.root / image, self.max_pixels))
        except DecodeError as error:
            raise ValueError(f"data.root: {self.root / image}: {error}; no frame may be left out") from None


class _SequenceBatches:
    """Batches, decoded on threads while the network works; never more than three in memory."""

    def __init__(self, data: EvaluationViewsDataModule, sequences: Sequence[ViewSequence]) -> None:
        self._data = data
        self._parts: list[tuple[int, list[str]]] = []  # number of the first frame in its sequence, and images
        for sequence in sequences:
            images = [frame.image for frame in sequence.frames]
            self._parts += [(row, [image]) for row, image in enumerate(images)] if data.is_streaming else [(0, images)]

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[MultiViewBatch]:
        with ThreadPoolExecutor(self._data.num_threads) as pool:
            waiting: deque[list[Future[PhotoView]]] = deque()
            for number, (first, images) in enumerate(self._parts):
                for _, coming in self._parts[number + len(waiting) : number + 1 + _AHEAD]:
                    waiting.append([pool.submit(self._data.load, image) for image in coming])
                try:
                    views = [future.result() for future in waiting.popleft()]
                except ValueError:
                    pool.shutdown(cancel_futures=True)
                    raise
                yield views_batch(images, views, first)
