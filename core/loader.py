"""Training and evaluation batches: which images in which order, broken ones replaced, waiting measured, resumable.

Randomness is a function: everything drawn for an image comes from (seed, epoch, index). The number of workers,
prefetching and a restart change nothing.
"""

import logging
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from core.config import Config
from core.datasets import ImageSource
from core.distributed import Processes
from core.errors import DataError, MachineError, shown
from core.images import MAX_PIXELS, BadImage, decode
from core.streams import ShardStream
from core.worker import STOP_SIGNALS, end_with_parent

MAX_TRIES = 20
PREFETCHED = 4  # micro-batches of each worker that wait in shared memory

logger = logging.getLogger("rcmae")


class LoaderConfig(Config):
    """How images are read."""

    num_workers: int | None = Field(None, ge=0)  # None: half the cores on a CPU, up to 16 beside a GPU
    max_broken_share: float = Field(0.01, ge=0, le=1)  # of the distinct images; beyond it training ends with an error
    max_pixels: int = Field(MAX_PIXELS, gt=0, le=178_000_000)  # larger images count as broken; Pillow has no more
    timeout_s: int = Field(300, gt=0)  # longest wait for one batch before the run ends
    stream_images: int | None = Field(None, gt=0)  # images in all shards; needed with URLs, which cannot be counted


class Broken(NamedTuple):
    """An image that could not be used, and why."""

    name: str
    reason: str


class Loaded(NamedTuple):
    """One micro-batch with what the loader has to say about it."""

    batch: Any
    broken: tuple[Broken, ...]
    shard: int  # position of the shard it came from; 0 for files


# decoded image, draws of this sample, index of the image in its source (-1 in a stream) -> sample
Prepare = Callable[[Tensor, np.random.Generator, int], Any]
Collate = Callable[[Sequence[Any]], Any]  # samples -> batch


def sample_rng(*key: int) -> np.random.Generator:
    """The generator of one sample: a pure function of its key, such as (seed, epoch, index)."""
    return np.random.default_rng(key)


@dataclass(frozen=True)
class EpochOrder:
    """Indices of one process's micro-batches from an optimizer step on; what fills no batch of an epoch is left out.

    A permutation per epoch drawn from (seed, epoch): a restart at any step goes on as if nothing had happened. The
    micro-batches of a global batch go to the processes in turn, so that it is the same batch however many there are.
    """

    num_images: int
    batch_size: int
    micro_batch: int
    seed: int
    first_step: int
    total_steps: int
    rank: int = 0
    num_processes: int = 1

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield [(epoch, index), ...] of each micro-batch, those of one global batch in a row."""
        stride = self.micro_batch * self.num_processes
        steps_per_epoch = self.num_images // self.batch_size
        order, current = np.empty(0, dtype=np.int64), -1
        for step in range(self.first_step, self.total_steps):
            epoch, place = divmod(step, steps_per_epoch)
            if epoch != current:
                order, current = sample_rng(self.seed, epoch).permutation(self.num_images), epoch
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            for start in range(self.rank * self.micro_batch, self.batch_size, stride):
                yield [(epoch, int(index)) for index in chosen[start : start + self.micro_batch]]


@dataclass(frozen=True)
class TrainingImages(Dataset):
    """Decoded and prepared samples by (epoch, index); a broken image is replaced by another drawn from the same key."""

    source: ImageSource
    seed: int
    prepare: Prepare
    channels: int = 3
    max_pixels: int = MAX_PIXELS

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, tuple[Broken, ...]]:
        """The sample, and the broken images that it stands for. Raises: DataError after 20 broken ones in a row."""
        epoch, index = key
        broken: list[Broken] = []
        replacements = sample_rng(self.seed, epoch, index, 1)
        for _ in range(MAX_TRIES):
            try:
                image = read_image(self.source, index, self.channels, self.max_pixels)
                return self.prepare(image, sample_rng(self.seed, *key), index), tuple(broken)
            except BadImage as error:
                broken.append(Broken(self.source.name(index), str(error)))
                index = int(replacements.integers(len(self.source)))
        raise _nothing_but_broken(broken)


@dataclass(frozen=True)
class StreamedImages(IterableDataset):
    """Micro-batches of a shard stream, each worker its own shards; broken images are passed over and reported."""

    stream: ShardStream
    seed: int
    prepare: Prepare
    collate: Collate
    micro_batch: int
    first_shard: int
    channels: int = 3
    max_pixels: int = MAX_PIXELS
    rank: int = 0
    num_processes: int = 1

    def __iter__(self) -> Iterator[Loaded]:
        """Yield micro-batches without end."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        worker, num_workers = self.rank * num_workers + worker, self.num_processes * num_workers
        samples: list[Any] = []
        broken: list[Broken] = []
        in_a_row = 0
        for shard, name, data in self.stream.images(self.first_shard, worker, num_workers):
            try:
                image = decode(data, self.channels, self.max_pixels)
            except BadImage as error:
                broken.append(Broken(shown(name), str(error)))
                in_a_row += 1
                if in_a_row == MAX_TRIES:
                    raise _nothing_but_broken(broken) from None
                continue
            in_a_row = 0
            rng = sample_rng(self.seed, shard, zlib.crc32(name.encode("utf-8", "replace")))
            samples.append(self.prepare(image, rng, -1))
            if len(samples) == self.micro_batch:
                yield Loaded(self.collate(samples), tuple(broken), shard)
                samples, broken = [], []


def _nothing_but_broken(broken: Sequence[Broken]) -> DataError:
    name, reason = broken[-1]
    return DataError(f"{MAX_TRIES} broken images in a row, the last {name}: {reason}; give data of whole images")


def read_image(source: ImageSource, index: int, channels: int, max_pixels: int) -> Tensor:
    """One decoded image, uint8 [channels, H, W]. Raises: BadImage, also for a file that cannot be read."""
    try:
        data = source.read(index)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from None
    return decode(data, channels, max_pixels)


@dataclass(frozen=True)
class _CollateLoaded:
    collate: Collate

    def __call__(self, items: Sequence[tuple[Any, tuple[Broken, ...]]]) -> Loaded:
        broken = tuple(note for _, notes in items for note in notes)
        return Loaded(self.collate([sample for sample, _ in items]), broken, 0)


def image_loader(
    images: TrainingImages, order: EpochOrder, collate: Collate, num_workers: int, timeout_s: int
) -> DataLoader:
    """Micro-batches of files in the given order."""
    options = _worker_options(num_workers, timeout_s)
    return DataLoader(images, batch_sampler=order, collate_fn=_CollateLoaded(collate), **options)


def stream_loader(images: StreamedImages, num_workers: int, timeout_s: int) -> DataLoader:
    """Micro-batches of a shard stream."""
    return DataLoader(images, batch_size=None, **_worker_options(num_workers, timeout_s))


def _worker_options(num_workers: int, timeout_s: int) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "timeout": timeout_s if num_workers else 0,
        "worker_init_fn": _init_worker,
        "pin_memory": torch.cuda.is_available(),
        "prefetch_factor": PREFETCHED if num_workers else None,
        # Its own generator: a DataLoader otherwise draws from the global stream, which nothing here may.
        "generator": torch.Generator(),
    }


def _init_worker(_: int) -> None:
    end_with_parent()
    # Signals reach the whole group; the main process decides when to stop.
    for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for_main_process, daemon=True).start()


def _end_for_main_process() -> None:
    """Heed SIGTERM from the main process alone: Python waits at its exit for each worker that it so asked to end."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@dataclass
class Feed:
    """Global batches one after the other, counting what was broken and how long was waited.

    Attributes:
        loader: micro-batches in order.
        accumulation: micro-batches in a global batch, of this process.
        max_broken: number of distinct broken images beyond which `take` raises.
        broken: reason by name of every broken image met so far, by this process since the last checkpoint.
        shards: for streams, the last shard position seen of each of this process's workers.
        wait_s: seconds spent waiting since it was last set to 0.
    """

    loader: Iterable[Any]
    accumulation: int
    max_broken: float
    broken: dict[str, str] = field(default_factory=dict)
    shards: list[int] = field(default_factory=list)
    wait_s: float = 0.0

    def __post_init__(self) -> None:
        self._micro_batches = iter(self.loader)
        self._taken = 0
        self._ahead: list[Any] | None = None

    def take(self) -> list[Any]:
        """This process's micro-batches of the next global batch.

        Raises: DataError beyond `max_broken`.
        """
        if self._ahead is not None:
            batches, self._ahead = self._ahead, None
            return batches
        start = time.perf_counter()
        batches = [self._next() for _ in range(self.accumulation)]
        self.wait_s += time.perf_counter() - start
        self._require_few_broken()
        return batches

    def peek(self) -> list[Any]:
        """What `take` will return next."""
        self._ahead = self.take()
        return self._ahead

    def shared(self, processes: Processes) -> tuple[dict[str, str], list[int]]:
        """Broken images met and shard positions reached by all processes: what a checkpoint stores.

        Raises: DataError if they have met more than `max_broken` together.
        """
        found = processes.gather([self.broken, self.shards])
        self.broken = {name: found_reason for broken, _ in found for name, found_reason in broken.items()}
        if processes.is_main:
            for name in self.broken.keys() - found[0][0].keys():
                logger.warning("replaced %s: %s", name, self.broken[name])
        self._require_few_broken()
        return self.broken, [shard for _, shards in found for shard in shards]

    def _require_few_broken(self) -> None:
        if len(self.broken) > self.max_broken:
            name, reason = next(reversed(self.broken.items()))
            raise DataError(
                f"{len(self.broken)} broken images, more than loader.max_broken_share allows ({self.max_broken:g}); "
                f"the last: {name}: {reason}; train.log names them all"
            )

    def _next(self) -> Any:
        loaded: Loaded = next(self._micro_batches)
        for note in loaded.broken:
            if note.name not in self.broken:
                self.broken[note.name] = note.reason
                logger.warning("replaced %s: %s", note.name, note.reason)
        if self.shards:
            self.shards[self._taken % len(self.shards)] = loaded.shard
        self._taken += 1
        return loaded.batch


@contextmanager
def worker_faults() -> Iterator[None]:
    """Turn the death or silence of a loader worker, which torch reports at any line of the main process, into an error.

    Raises: MachineError; DataError without the traceback that torch puts around one from a worker.
    """
    try:
        yield
    except DataError as error:
        error.__traceback__ = None  # torch's holds itself and so the loader, whose workers would live on
        raise DataError(str(error).rpartition("core.errors.DataError: ")[2].strip()) from None
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise MachineError(
            f"a loader worker died or was silent for loader.timeout_s seconds ({str(error).splitlines()[0]}); "
            "give the same command again to go on, with fewer loader.num_workers if memory was short",
            final=False,
        ) from None


class EvalBatch(NamedTuple):
    """Images for evaluation; rows with valid = False only fill the last batch up and must not be counted."""

    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B], -1 where the source has none
    valid: Tensor  # bool [B]


class EvalItem(NamedTuple):
    """One row of an `EvalBatch`. Items of other evaluations have the image first too, and `valid`."""

    image: Any  # what the transform made of it
    label: int
    valid: bool


@dataclass(frozen=True)
class EvalImages(Dataset):
    """Every image of a source once, in order. A broken one is an error: an evaluation never skips."""

    source: ImageSource
    transform: Callable[[Tensor], Any]  # gives a tensor, unless the batches are made by another `collate`
    channels: int = 3
    max_pixels: int = MAX_PIXELS

    def __getitem__(self, index: int) -> EvalItem:
        """One image; an index past the end is a filler. Raises: DataError naming a broken image."""
        valid = index < len(self.source)
        index = index if valid else 0
        try:
            image = read_image(self.source, index, self.channels, self.max_pixels)
        except BadImage as error:
            raise DataError(
                f"{shown(self.source.origin)}: {self.source.name(index)}: {error}; an evaluation counts every image, "
                "so mend or remove it"
            ) from None
        label = -1 if self.source.labels is None else int(self.source.labels[index])
        return EvalItem(self.transform(image), label, valid)


@dataclass(frozen=True)
class EvalOrder:
    """Full batches of one process, dealt out in turn; every process has as many, filled up past the end.

    The batches are the same however many processes there are, so that each image meets the same neighbours.
    """

    num_images: int
    batch_size: int
    rank: int = 0
    num_processes: int = 1

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each batch; those past the end stand for fillers."""
        for turn in range(len(self)):
            start = (turn * self.num_processes + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return -(-self.num_images // (self.batch_size * self.num_processes))


def eval_loader(
    images: EvalImages,
    batch_size: int,
    num_workers: int,
    timeout_s: int,
    processes: Processes,
    collate: Collate | None = None,
) -> Iterator[Any]:
    """This process's full batches; `in_order` brings results of all together again.

    Args:
        collate: makes a batch of `batch_size` items of `images`; None: an `EvalBatch`.
    Raises: as `worker_faults`.
    """
    order = EvalOrder(len(images.source), batch_size, processes.rank, processes.size)
    options = _worker_options(num_workers, timeout_s)
    with worker_faults():
        yield from DataLoader(images, batch_sampler=order, collate_fn=collate or collate_eval, **options)


def in_order(rows: list[Tensor], valid: list[Tensor], processes: Processes) -> Tensor:
    """Rows of the same batches [B, *] of all processes, fillers dropped, in the order of the images: [N, *]."""
    values = processes.stack(torch.stack(rows))  # [size, batches, B, *]
    keep = processes.stack(torch.stack(valid).to(torch.uint8))  # [size, batches, B]
    # The batches were dealt out in turn: the first of each process, then the second of each.
    return values.transpose(0, 1).flatten(0, 2)[keep.transpose(0, 1).flatten().bool()]


# `eval_loader`, or what does more than that with the images on their way; its arguments in their order
Read = Callable[[EvalImages, int, int, int, Processes, Collate | None], Iterable[Any]]


def collate_eval(items: Sequence[EvalItem]) -> EvalBatch:
    """Items of one size as a batch."""
    images, labels, valid = zip(*items, strict=True)
    return EvalBatch(torch.stack(images), torch.tensor(labels), torch.tensor(valid))
