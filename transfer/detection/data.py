"""Samples and batches of a detector: jittered ones to learn from, whole ones to evaluate on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.errors import DataError, shown
from core.images import BadImage
from core.loader import EvalBatch, EvalImages, EvalItem, read_image
from core.transforms import normalized_images
from transfer.detection.coco import CocoSet
from transfer.detection.jitter import Draws, JitterConfig, eval_size, jitter, resize_to_fit
from transfer.detection.targets import Targets


@dataclass(frozen=True)
class DetectionBatch:
    """One micro-batch.

    Attributes:
        images: uint8 [B, 3, S, S] RGB, not normalised (see `normalized`); black right of and below the content.
        sizes: int64 [B, 2], (height, width) of the content, at most S.
        valid: bool [B]; False for images that only fill an evaluation batch up.
        targets: B, in pixels of the content; without objects in evaluation.
        original_sizes: B times (height, width) of the image as stored; on the host.
        indices: B, of the images in their `CocoSet`; on the host.
    """

    images: Tensor
    sizes: Tensor
    valid: Tensor
    targets: tuple[Targets, ...]
    original_sizes: tuple[tuple[int, int], ...]
    indices: tuple[int, ...]

    def to(self, device: torch.device) -> "DetectionBatch":
        """The batch on a device; pinned memory is copied without blocking. Polygons stay on the host."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "DetectionBatch":
        """The batch in pinned memory (called by the loader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "DetectionBatch":
        targets = tuple(
            Targets(
                function(each.boxes),
                function(each.labels),
                tuple(function(mask) if isinstance(mask, Tensor) else mask for mask in each.masks),
            )
            for each in self.targets
        )
        images, sizes, valid = map(function, (self.images, self.sizes, self.valid))
        return replace(self, images=images, sizes=sizes, valid=valid, targets=targets)


class Sample(NamedTuple):
    """One prepared image."""

    image: Tensor  # uint8 [3, h, w]
    targets: Targets
    original_size: tuple[int, int]  # (height, width)
    row: int  # of the image in its set


@dataclass(frozen=True)
class PrepareDetection:
    """Jitter one image of a set, drawn from its own generator. Runs in a loader worker.

    Attributes:
        coco: the images by their index, with annotations.
        side: of the square that images are cropped to, in pixels.
    """

    coco: CocoSet
    side: int
    config: JitterConfig

    def __call__(self, image: Tensor, rng: np.random.Generator, index: int) -> Sample:
        """uint8 [3, H, W] to a sample of at most side x side.

        Raises: BadImage if the image has another size than its annotations were made for: it is replaced, not resized.
        """
        require_size(self.coco, image, index)
        moved, targets = jitter(image, self.coco.objects(index), self.side, self.config, Draws(*rng.random(3)))
        return Sample(moved, targets, self.coco.size(index), index)


@dataclass(frozen=True)
class Collate:
    """Pads samples to squares of one side, and stacks them. A named class so that loader workers can receive it."""

    side: int

    def __call__(self, samples: Sequence[Sample]) -> DetectionBatch:
        """B samples to a batch."""
        return DetectionBatch(
            images=torch.stack([padded(sample.image, self.side) for sample in samples]),
            sizes=torch.tensor([sample.image.shape[1:] for sample in samples]),
            valid=torch.ones(len(samples), dtype=torch.bool),
            targets=tuple(sample.targets for sample in samples),
            original_sizes=tuple(sample.original_size for sample in samples),
            indices=tuple(sample.row for sample in samples),
        )


@dataclass(frozen=True)
class FitToSquare:
    """Resize for evaluation and pad; a named class so that loader workers can receive it."""

    side: int

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] to uint8 [3, side, side], black where the image does not reach."""
        return padded(resize_to_fit(image, self.side), self.side)


@dataclass(frozen=True, kw_only=True)
class CocoEvalImages(EvalImages):
    """Every image of a set once, in order, each of the size that its annotations were made for.

    For `core.loader.eval_loader`; the label of each is its index. `coco` is whose `source()` it reads.
    """

    coco: CocoSet

    def __getitem__(self, index: int) -> EvalItem:
        """One image, its label its index. Raises: DataError naming an image that is broken or of another size."""
        valid = index < len(self.coco)
        row = index if valid else 0
        try:
            image = read_image(self.source, row, self.channels, self.max_pixels)
            require_size(self.coco, image, row)
        except BadImage as error:
            raise DataError(
                f"{shown(self.coco.origin)}: {self.source.name(row)}: {error}; an evaluation counts every image, so "
                "mend it, or remove it from the JSON"
            ) from None
        return EvalItem(self.transform(image), row, valid)


def evaluation_images(coco: CocoSet, side: int) -> CocoEvalImages:
    """The images of a set for `core.loader.eval_loader`, resized and padded to `side`."""
    return CocoEvalImages(source=coco.source(), transform=FitToSquare(side), coco=coco)


def detection_batch(batch: EvalBatch, coco: CocoSet, side: int) -> DetectionBatch:
    """An evaluation batch with what the detector needs to know of its images."""
    indices = tuple(batch.labels.tolist())
    original = tuple(coco.size(index) for index in indices)
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), ())
    return DetectionBatch(
        images=batch.images,
        sizes=torch.tensor([eval_size(size, side) for size in original]),
        valid=batch.valid,
        targets=(nothing,) * len(indices),
        original_sizes=original,
        indices=indices,
    )


def normalized(batch: DetectionBatch, dtype: torch.dtype) -> Tensor:
    """The network's input [B, 3, S, S]: ImageNet's mean and deviation, then zeros around the content. Spec 1.4."""
    return normalized_images(batch.images, batch.sizes, dtype)


def require_size(coco: CocoSet, image: Tensor, index: int) -> None:
    """Raise BadImage unless the image [3, H, W] has the size that the JSON says."""
    found, expected = (image.shape[1], image.shape[2]), coco.size(index)
    if found != expected:
        turned = " (turned by its EXIF orientation?)" if found == expected[::-1] else ""
        raise BadImage(f"has {found[1]}x{found[0]} px{turned}, the annotations are for {expected[1]}x{expected[0]}")


def padded(image: Tensor, side: int) -> Tensor:
    """An image uint8 [3, h, w] in the top left of a black square: [3, side, side].

    Raises: ValueError for an image larger than the square: the reference crops it in silence.
    """
    _, h, w = image.shape
    if max(h, w) > side:
        raise ValueError(f"padded: an image of {w}x{h} px does not fit a square of {side}; resize it first")
    square = image.new_zeros(3, side, side)
    square[:, :h, :w] = image
    return square
