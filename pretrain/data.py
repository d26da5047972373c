"""What the pretraining loader makes of an image: one random crop, maybe mirrored, and the noise of its masks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.transforms import AugmentConfig, random_crop_flip


@dataclass(frozen=True)
class PretrainBatch:
    """One micro-batch.

    Attributes:
        images: uint8 [B, C, H, W], not normalised.
        sizes: int64 [B, 2], (height, width) of the content; here always the whole image.
        valid: bool [B]; here always True.
        noise: float32 [B, L] uniform in [0, 1): the mask of the student, and of a teacher that shares it.
        teacher_noise: float32 [B, L], another draw for a teacher with its own mask, else None.
    """

    images: Tensor
    sizes: Tensor
    valid: Tensor
    noise: Tensor
    teacher_noise: Tensor | None = None

    def to(self, device: torch.device) -> "PretrainBatch":
        """The batch on a device; pinned memory is copied without blocking."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PretrainBatch":
        """The batch in pinned memory (called by the loader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PretrainBatch":
        changed = {name: function(value) for name, value in vars(self).items() if value is not None}
        return replace(self, **changed)


class Sample(NamedTuple):
    """One prepared image."""

    image: Tensor  # uint8 [C, H, W]
    noise: np.ndarray  # float32 [1 or 2, L]


@dataclass(frozen=True)
class PrepareSample:
    """Crop, flip and draw the noise of one image, all from its own generator. Runs in a loader worker."""

    img_size: tuple[int, int]
    num_patches: int
    augment: AugmentConfig
    own_teacher_mask: bool

    def __call__(self, image: Tensor, rng: np.random.Generator, index: int) -> Sample:
        """uint8 [C, h, w] of any size to a sample of the configured size."""
        crop = random_crop_flip(image, self.img_size, self.augment, rng)
        return Sample(crop, rng.random((1 + self.own_teacher_mask, self.num_patches), dtype=np.float32))


def collate(samples: Sequence[Sample]) -> PretrainBatch:
    """Stack samples into a batch."""
    images = torch.stack([sample.image for sample in samples])  # [B, C, H, W]
    noise = torch.from_numpy(np.stack([sample.noise for sample in samples]))  # [B, 1 or 2, L]
    B, _, H, W = images.shape
    return PretrainBatch(
        images=images,
        sizes=torch.tensor([H, W]).expand(B, 2).contiguous(),
        valid=torch.ones(B, dtype=torch.bool),
        noise=noise[:, 0].contiguous(),
        teacher_noise=noise[:, 1].contiguous() if noise.shape[1] > 1 else None,
    )
