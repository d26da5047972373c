"""Features of regions: each from the pyramid's map that suits its size, by ROIAlign. Spec detection 4.2.

Letters: B images, C channels, R ROIs, S side of what is pooled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import roi_align

CANONICAL_SIZE = 224  # px, side of a region that is pooled from p4 where that has stride 16
CANONICAL_LEVEL, MIN_LEVEL, MAX_LEVEL = 4, 2, 5


@dataclass(frozen=True)
class RoiPooler:
    """Pools regions from p2 ... p5 by fixed scales, whatever the unpadded images measure.

    Attributes:
        strides: of p2 ... p5 in pixels; further ones are ignored.
    """

    strides: tuple[int, ...]

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Level 2..5 of each box [R, 4]: int64 [R]. The small number stands inside the logarithm, as published."""
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        canonical_size = CANONICAL_SIZE * self.strides[CANONICAL_LEVEL - MIN_LEVEL] / 16
        level = torch.floor(CANONICAL_LEVEL + torch.log2(area.sqrt() / canonical_size + 1e-8))
        return level.clamp(MIN_LEVEL, MAX_LEVEL).long()

    def __call__(self, features: Sequence[Tensor], boxes: Tensor, image: Tensor, output_size: int) -> Tensor:
        """Pool boxes [R, 4] (pixels of the padded images), each of image [R], from p2 ... p5 [B, C, h, w].

        ROIs are sorted by level, so that the host reads four counts once instead of looking for those of each level.
        Returns: [R, C, S, S] in the dtype of the features.
        """
        levels = self.assign_levels(boxes) - MIN_LEVEL  # [R]
        order = levels.argsort(stable=True)
        each = torch.arange(MAX_LEVEL - MIN_LEVEL + 1, device=levels.device)
        counts = (levels == each.unsqueeze(1)).sum(dim=1).tolist()
        rois = torch.cat([image.unsqueeze(1).to(boxes.dtype), boxes], dim=1)[order]  # [R, 5]
        pooled = [
            roi_align(feature, part.to(feature.dtype), output_size, 1 / stride, sampling_ratio=0, aligned=True)
            for feature, stride, part in zip(features, self.strides, rois.split(counts), strict=False)
        ]
        return torch.cat(pooled).index_select(0, order.argsort())  # [R, C, S, S]
