"""Detectors and segmentors under corruption: what is common to both.

An image is corrupted as it was decoded, and from there on goes the way that it goes in `rcmae detect --eval` and
`rcmae segment --eval`, through the same code.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.distributed import Processes
from core.errors import DataError, shown
from core.loader import Collate, EvalImages, Read, collate_eval, eval_loader
from robustness.cell_evaluator import Beat, Found, corruption_of
from robustness.corruptions.apply import MIN_SIDE
from robustness.evaluation import Corrupt, Reading, corrupted
from robustness.grid import Cell, OpenSet
from robustness.imagenet_sets import Decoded
from robustness.settings import Kind, RobustConfig

AT_ONCE = 16  # images corrupted in one call on a GPU, those of one size together; on a CPU there is nothing to gain


@dataclass(frozen=True)
class DenseModel:
    """A detector or segmentor under test; a `Tested`.

    Attributes:
        grids: the figures of a cell that make grids.
        words: what it is and how images come to it.
    """

    kind: Kind
    name: str
    digest: str
    classes: tuple[str, ...]
    img_size: tuple[int, int]
    precision: str
    grids: tuple[str, ...]
    words: str

    def units(self, name: str) -> tuple[str, ...]:
        """As `Tested`."""
        return self.grids

    def described(self) -> str:
        """As `Tested`."""
        return self.words


@dataclass(frozen=True)
class DenseSet(OpenSet):
    """Images with annotations; `identity` is that of both."""

    identity: str = ""

    @property
    def digest(self) -> str:
        """Identifies the images and what is annotated in them, wherever they lie."""
        return self.identity


class Dense(NamedTuple):
    """A model, the images that it is tested on, and its evaluation on them as a reader hands them over."""

    model: DenseModel
    images: DenseSet
    evaluate: Callable[[Read], dict[str, float]]


class DenseCells:
    """An `Examine` of a detector or segmentor. What is kept of a cell besides: the seconds spent corrupting."""

    def __init__(self, dense: Dense, config: RobustConfig, device: torch.device, reading: Reading, beat: Beat) -> None:
        self._dense, self._config, self._device, self._reading, self._beat = dense, config, device, reading, beat

    def __call__(self, cell: Cell) -> Found:
        """The figures of one cell."""
        ids = self._dense.images.ids
        corrupt = corruption_of(cell, self._config.frost_textures)
        reader = CorruptingReader(corrupt, ids, self._device, self._reading.max_pixels, self._beat)
        figures = self._dense.evaluate(reader)
        return Found(figures, self._dense.images, {"corrupting_s": reader.corrupting_s})


class CorruptingReader:
    """A `core.loader.Read` for one process that corrupts images between decoding and everything else.

    They are decoded by the loader's workers; corrupted here, on the device; resized here.
    """

    def __init__(
        self, corrupt: Corrupt | None, ids: np.ndarray, device: torch.device, max_pixels: int, beat: Beat
    ) -> None:
        """Args: corrupt: None for clean images. ids: [N], what the draws of each image depend on."""
        self._corrupt, self._ids, self._device, self._max_pixels, self._beat = corrupt, ids, device, max_pixels, beat
        self.corrupting_s = 0.0

    def __call__(
        self,
        images: EvalImages,
        batch_size: int,
        num_workers: int,
        timeout_s: int,
        processes: Processes,
        collate: Collate | None = None,
    ) -> Iterator[Any]:
        """Yield the batches of `eval_loader`, of corrupted images, without fillers."""
        assert processes.size == 1, "the processes of a sweep share cells, not images"
        images = replace(images, max_pixels=self._max_pixels)
        batches: Iterable[Any]
        if self._corrupt is None:
            batches = eval_loader(images, batch_size, num_workers, timeout_s, processes, collate)
        else:
            batches = self._batches(images, self._corrupt, batch_size, num_workers, timeout_s, collate or collate_eval)
        for batch in batches:
            self._beat()
            yield batch

    def _batches(
        self, images: EvalImages, corrupt: Corrupt, batch_size: int, num_workers: int, timeout_s: int, collate: Collate
    ) -> Iterator[Any]:
        decoded = replace(images, transform=Decoded())
        at_once = batch_size * (AT_ONCE if self._device.type == "cuda" else 1)
        first = 0
        for loaded in eval_loader(decoded, at_once, num_workers, timeout_s, Processes(), list):
            items = [item for item in loaded if item.valid]
            self._require_sides(images, [item[0] for item in items], first)
            begun = time.perf_counter()
            pictures = corrupted(
                [item[0] for item in items], self._ids[first : first + len(items)].tolist(), corrupt, self._device
            )
            pictures = [picture.cpu() for picture in pictures]
            self.corrupting_s += time.perf_counter() - begun
            ready = [
                type(item)(images.transform(picture), *item[1:]) for item, picture in zip(items, pictures, strict=True)
            ]
            yield from (collate(ready[start : start + batch_size]) for start in range(0, len(ready), batch_size))
            first += len(items)

    @staticmethod
    def _require_sides(images: EvalImages, pictures: Sequence[Tensor], first: int) -> None:
        for place, picture in enumerate(pictures, start=first):
            _, height, width = picture.shape
            if min(height, width) < MIN_SIDE:
                raise too_small(images.source.origin, images.source.name(place), height, width)


def too_small(origin: str, name: str, height: int, width: int) -> DataError:
    """The error for an image that cannot be corrupted; `name` is printable."""
    return DataError(
        f"{shown(origin)}: {name} has {width}x{height} px; corruptions need sides of {MIN_SIDE} px, so leave it out of "
        "the set"
    )


def published_precision(config: RobustConfig) -> str:
    """Detectors and segmentors are evaluated in fp32, as published and as their verbs do, unless told otherwise."""
    return "bf16" if config.precision == "bf16" else "fp32"
