"""Samples and batches of a segmentor: augmented crops to learn from, whole images to evaluate on.

Letters: B images, S side of the crop, H W an image as stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import DataError, shown
from core.images import BadImage
from core.loader import EvalImages, read_image
from core.transforms import normalized_images
from transfer.segmentation.augment import AugmentConfig, Size, augment, resize_image, without_threads
from transfer.segmentation.labels import BadLabel, LabelTable, OutOfRange, read_label
from transfer.segmentation.pairs import SegmentationSet

Sizes = Callable[[Size], Sequence[Size]]  # (height, width) as stored -> those to evaluate at; workers must receive it


@dataclass(frozen=True)
class SegmentationBatch:
    """One micro-batch to learn from.

    Attributes:
        images: uint8 [B, 3, S, S] RGB, not normalised (see `normalized`); black right of and below the content.
        labels: uint8 or int32 [B, S, S], `ignore_index` there.
        sizes: int64 [B, 2], (height, width) of the content, at most S.
        valid: bool [B]; all of them count.
        indices: B, of the images in their `SegmentationSet`; on the host.
    """

    images: Tensor
    labels: Tensor
    sizes: Tensor
    valid: Tensor
    indices: tuple[int, ...]

    def to(self, device: torch.device) -> "SegmentationBatch":
        """The batch on a device; pinned memory is copied without blocking."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "SegmentationBatch":
        """The batch in pinned memory (called by the loader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "SegmentationBatch":
        images, labels, sizes, valid = map(function, (self.images, self.labels, self.sizes, self.valid))
        return replace(self, images=images, labels=labels, sizes=sizes, valid=valid)


class Sample(NamedTuple):
    """One prepared image."""

    image: Tensor  # uint8 [3, h, w]
    label: Tensor  # uint8 or int32 [h, w]
    row: int  # of the image in its set


@dataclass(frozen=True)
class PrepareSegmentation:
    """Augment one image of a set and its label, drawn from its own generator. Runs in a loader worker.

    Attributes:
        pairs: the images by their index, with their labels.
        crop: side of the crop, in pixels.
    """

    pairs: SegmentationSet
    table: LabelTable
    crop: int
    config: AugmentConfig

    def __post_init__(self) -> None:
        without_threads()

    def __call__(self, image: Tensor, rng: np.random.Generator, index: int) -> Sample:
        """uint8 [3, H, W] to a sample of at most crop x crop.

        Raises: BadImage where the label cannot be read or has another size: the image is replaced. DataError for a
            value without a meaning: then it is not one file that is wrong.
        """
        label = read_classes_of(self.pairs, self.table, index, (image.shape[1], image.shape[2]))
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())  # [H, W, 3]
        draws = np.random.RandomState(int(rng.integers(2**32)))
        pixels, label = augment(pixels, label, self.crop, self.table.ignore_index, self.config, draws)
        return Sample(torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(label), index)


def read_classes_of(pairs: SegmentationSet, table: LabelTable, index: int, size: Size) -> np.ndarray:
    """The label of one image as classes, uint8 or int32 [H, W].

    Args:
        size: (height, width) of the image.
    Raises: BadImage for a label that cannot be read or has another size; DataError for a value without a meaning.
    """
    stored = read_stored(pairs, index, size)
    try:
        return table(stored)
    except OutOfRange as error:
        raise DataError(
            f"{shown(pairs.labels.origin)}: {pairs.labels.name(index)}: {error}, which is no class; expected "
            f"{table.expected}; give label_shift, label_map or ignore_index; rcmae doctor shows all values"
        ) from None


def read_stored(pairs: SegmentationSet, index: int, size: Size | None = None) -> np.ndarray:
    """The stored values of one label, uint8 or uint16 [H, W]. Raises: BadLabel with its name and the reason."""
    name = pairs.labels.name(index)
    try:
        return read_label(pairs.labels.read(index), size)
    except OSError as error:
        raise BadLabel(f"label {name}: cannot be read: {error.strerror}") from None
    except BadLabel as error:
        raise BadLabel(f"label {name}: {error}") from None


@dataclass(frozen=True)
class Collate:
    """Pads samples to squares of one side, and stacks them. A named class so that loader workers can receive it."""

    crop: int
    ignore_index: int

    def __call__(self, samples: Sequence[Sample]) -> SegmentationBatch:
        """B samples to a batch."""
        return SegmentationBatch(
            images=torch.stack([_padded(sample.image, self.crop, 0) for sample in samples]),
            labels=torch.stack([_padded(sample.label, self.crop, self.ignore_index) for sample in samples]),
            sizes=torch.tensor([tuple(sample.label.shape) for sample in samples]),
            valid=torch.ones(len(samples), dtype=torch.bool),
            indices=tuple(sample.row for sample in samples),
        )


def _padded(values: Tensor, side: int, value: int) -> Tensor:
    """Values [*, h, w] in the top left of a square [*, side, side]."""
    h, w = values.shape[-2:]
    return F.pad(values, (0, side - w, 0, side - h), value=value)


def normalized(batch: SegmentationBatch, dtype: torch.dtype) -> Tensor:
    """The network's input [B, 3, S, S]: ImageNet's mean and deviation, then zeros around the content. Spec 6.2."""
    return normalized_images(batch.images, batch.sizes, dtype)


# ---- evaluation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationBatch:
    """One image at the sizes that it is evaluated at, and its label as stored.

    Attributes:
        images: uint8 [1, 3, h, w] RGB each, not normalised.
        labels: uint8 or int32 [1, H, W].
        indices: int64 [1], of the image in its set.
        valid: bool [1]; False for a filler, which must not be counted.
    """

    images: tuple[Tensor, ...]
    labels: Tensor
    indices: Tensor
    valid: Tensor

    def to(self, device: torch.device) -> "EvaluationBatch":
        """The batch on a device; pinned memory is copied without blocking."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "EvaluationBatch":
        """The batch in pinned memory (called by the loader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "EvaluationBatch":
        rest = map(function, (self.labels, self.indices, self.valid))
        return EvaluationBatch(tuple(map(function, self.images)), *rest)


class EvaluationSample(NamedTuple):
    """As `EvaluationBatch`, without the axis of the batch."""

    images: tuple[Tensor, ...]
    label: Tensor
    row: int
    valid: bool


@dataclass(frozen=True)
class Resized:
    """An image at each of some sizes; a named class so that loader workers can receive it."""

    sizes: Sizes

    def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
        """uint8 [3, H, W] to uint8 [3, h, w] each."""
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())  # [H, W, 3]
        resized = (resize_image(pixels, size) for size in self.sizes((image.shape[1], image.shape[2])))
        return tuple(torch.from_numpy(each).permute(2, 0, 1).contiguous() for each in resized)


@dataclass(frozen=True, kw_only=True)
class SegmentationEvalImages(EvalImages):
    """Every image of a set once, in order, with its label."""

    pairs: SegmentationSet
    table: LabelTable

    def __post_init__(self) -> None:
        without_threads()

    def __getitem__(self, index: int) -> EvaluationSample:  # type: ignore[override]
        """One sample; an index past the end is a filler.

        Raises: DataError naming an image or label that is broken, of another size, or holds a value without a meaning.
        """
        valid = index < len(self.pairs)
        row = index if valid else 0
        try:
            image = read_image(self.source, row, self.channels, self.max_pixels)
            label = read_classes_of(self.pairs, self.table, row, (image.shape[1], image.shape[2]))
        except BadImage as error:
            raise DataError(
                f"{shown(self.pairs.origin)}: {self.source.name(row)}: {error}; an evaluation counts every image, so "
                "mend it, or remove it and its label"
            ) from None
        return EvaluationSample(self.transform(image), torch.from_numpy(label), row, valid)


def one_image(samples: Sequence[EvaluationSample]) -> EvaluationBatch:
    """A sample as a batch of one: images of several sizes cannot be stacked."""
    (sample,) = samples
    images = tuple(image.unsqueeze(0) for image in sample.images)
    return EvaluationBatch(images, sample.label.unsqueeze(0), torch.tensor([sample.row]), torch.tensor([sample.valid]))


def evaluation_images(pairs: SegmentationSet, table: LabelTable, sizes: Sizes) -> SegmentationEvalImages:
    """The images of a set for `core.loader.eval_loader`, with batches of 1 by `one_image`.

    Args:
        sizes: the (height, width) pairs that an image of a (height, width) is resized to.
    """
    return SegmentationEvalImages(source=pairs.images, transform=Resized(sizes), pairs=pairs, table=table)
