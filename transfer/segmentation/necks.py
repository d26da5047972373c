"""The neck between a plain ViT and UperNet: four maps of one stride become four of strides 4, 8, 16 and 32.

Letters: B batch, D width of the ViT, h w rows and columns of patches. Spec segmentation section 2.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_LEVELS = 4


class Feature2Pyramid(nn.Module):
    """Four depths of a ViT made as large as 4, 2, 1 and 1/2 times their grid; the width stays.

    Unlike ViTDet's pyramid it draws on four blocks, and normalises by the batch. Its batch norm is PyTorch's, so that
    `nn.SyncBatchNorm.convert_sync_batchnorm` finds it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.upsample_4x = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
        )
        self.upsample_2x = nn.ConvTranspose2d(dim, dim, 2, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps [B, D, h, w], shallow to deep, to [B, D, 4h, 4w], [B, D, 2h, 2w], [B, D, h, w], [B, D, h/2, w/2].

        An odd h or w is rounded down by the last one, and must be two at least.
        """
        first, second, third, fourth = maps
        return [
            self.upsample_4x(first),  # [B, D, 4h, 4w]
            self.upsample_2x(second),  # [B, D, 2h, 2w]
            third,
            F.max_pool2d(fourth, 2),  # [B, D, h / 2, w / 2]
        ]

    def init_weights(self, generator: torch.Generator) -> None:
        """PyTorch's default for the transposed convolutions, from a generator of our own; the norm one and zero."""
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                assert module.bias is not None, "the published neck has biases"
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
