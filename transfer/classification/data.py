"""What the loader makes of an image for a classifier: a crop, maybe augmented, and its label; and labelled sets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.transforms import AugmentConfig, Box, DrawBox, random_crop_flip
from transfer.classification.augment import Fill, RandAugmentConfig, erase_box, rand_augment


@dataclass(frozen=True)
class LabelledBatch:
    """One micro-batch.

    Attributes:
        images: uint8 [B, C, H, W], not normalised.
        sizes: int64 [B, 2], (height, width) of the content; here always the whole image.
        valid: bool [B]; here always True.
        labels: int64 [B].
        erased: int64 [B, 4], (top, left, height, width) of what is erased after normalisation; of no area for none.
    """

    images: Tensor
    sizes: Tensor
    valid: Tensor
    labels: Tensor
    erased: Tensor

    def to(self, device: torch.device) -> "LabelledBatch":
        """The batch on a device; pinned memory is copied without blocking."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "LabelledBatch":
        """The batch in pinned memory (called by the loader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "LabelledBatch":
        return replace(self, **{name: function(value) for name, value in vars(self).items()})


class Sample(NamedTuple):
    """One prepared image."""

    image: Tensor  # uint8 [C, H, W]
    label: int
    erased: Box


@dataclass(frozen=True)
class PrepareLabelled:
    """Crop, flip, augment and label one image, all drawn from its own generator. Runs in a loader worker.

    Attributes:
        labels: [N] class of every image of the source.
        draw_box: the crop's rule.
        fill: value per channel of what RandAugment brings into view.
        erase_prob: share of images of which a part is erased.
    """

    img_size: tuple[int, int]
    labels: np.ndarray
    augment: AugmentConfig
    draw_box: DrawBox
    rand_augment: RandAugmentConfig
    fill: Fill
    erase_prob: float

    def __call__(self, image: Tensor, rng: np.random.Generator, index: int) -> Sample:
        """uint8 [C, h, w] of any size to a sample of the configured size."""
        crop = random_crop_flip(image, self.img_size, self.augment, rng, self.draw_box)
        crop = rand_augment(crop, self.rand_augment, self.fill, rng)
        return Sample(crop, int(self.labels[index]), erase_box(self.img_size, self.erase_prob, rng))


def collate(samples: Sequence[Sample]) -> LabelledBatch:
    """Stack samples into a batch."""
    images = torch.stack([sample.image for sample in samples])  # [B, C, H, W]
    B, _, H, W = images.shape
    return LabelledBatch(
        images=images,
        sizes=torch.tensor([H, W]).expand(B, 2).contiguous(),
        valid=torch.ones(B, dtype=torch.bool),
        labels=torch.tensor([sample.label for sample in samples]),
        erased=torch.tensor([sample.erased for sample in samples]),
    )
