"""Images streamed from tar shards behind URLs (webdataset layout), resumable at shard granularity.

Shards are read in an order drawn from (seed, epoch). Every batch carries the position of the shard that it came from; a
resumed run starts at the first shard that some worker had not finished, so up to one shard per worker is seen twice.
"""

import http.client
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

import braceexpand
import numpy as np
from webdataset.tariterators import tar_file_iterator

from core.errors import DataError, shown
from core.images import EXTENSIONS

SCHEMES = ("http://", "https://")
SHUFFLE_BUFFER = 512  # encoded images held back per worker
TIMEOUT_S = 60


def is_stream(data: str) -> bool:
    """Whether `data=` names shards behind URLs rather than files here."""
    return data.startswith(SCHEMES)


@dataclass(frozen=True)
class ShardStream:
    """URLs of tar shards; `http(s)://host/name-{0000..0127}.tar` gives 128 of them."""

    urls: tuple[str, ...]
    seed: int

    def images(self, start: int, worker: int, num_workers: int) -> Iterator[tuple[int, str, bytes]]:
        """Endless (shard position, name, bytes) of one worker's share, beginning at shard position `start`.

        Position p stands for shard `order(p // num_shards)[p % num_shards]`; worker w reads the positions with
        p % num_workers == w. Raises: DataError if a shard cannot be fetched or holds no images.
        """
        position = start + (worker - start) % num_workers
        while True:
            yield from self._shuffled(position)
            position += num_workers

    def _shuffled(self, position: int) -> Iterator[tuple[int, str, bytes]]:
        epoch, place = divmod(position, len(self.urls))
        url = self.urls[int(np.random.default_rng([self.seed, epoch]).permutation(len(self.urls))[place])]
        rng = np.random.default_rng([self.seed, position, 1])
        held: list[tuple[int, str, bytes]] = []
        for name, data in shard_images(url):
            held.append((position, name, data))
            if len(held) > SHUFFLE_BUFFER:
                index = int(rng.integers(len(held)))
                held[index], held[-1] = held[-1], held[index]
                yield held.pop()
        for index in rng.permutation(len(held)):
            yield held[index]


def expand_urls(data: str) -> tuple[str, ...]:
    """The URLs of a brace pattern. Raises: DataError if one is no http(s) URL of a .tar."""
    try:
        urls = tuple(braceexpand.braceexpand(data))
    except ValueError:  # unbalanced braces
        raise DataError(
            f"{shown(data)}: unbalanced braces; expected a pattern such as shard-{{0000..0127}}.tar"
        ) from None
    for url in urls:
        if not url.startswith(SCHEMES) or not urllib.parse.urlsplit(url).path.endswith(".tar"):
            raise DataError(f"{shown(url)}: expected http(s) URLs that end in .tar")
    return urls


def shard_images(url: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every image in one shard, in order. Raises: DataError naming the URL."""
    name, count = PurePosixPath(urllib.parse.urlsplit(url).path).name, 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as stream:  # noqa: S310  the scheme was checked
            shard = _Tail(stream)
            for member in tar_file_iterator(shard):
                path = PurePosixPath(member["fname"])
                if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
                    count += 1
                    yield f"{name}/{path}", member["data"]
            shard.require_end()
    except (OSError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
        raise DataError(f"{shown(url)}: cannot be streamed: {shown(str(error))}") from None
    if not count:
        raise DataError(f"{shown(url)}: no images in this shard; expected members such as 000001.jpg")


class _Tail:
    """Passes a stream on and keeps its last block: tarfile takes a connection lost between two members for the end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._last = b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._last = (self._last + data)[-tarfile.BLOCKSIZE :]
        return data

    def require_end(self) -> None:
        """Raise tarfile.ReadError if the stream does not end with the zeros that end a tar."""
        while self.read(1 << 20):
            pass
        if self._last != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("end mark missing, the shard is cut off")
