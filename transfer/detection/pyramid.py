"""The simple feature pyramid: five maps of different strides, all made from the ViT's last one. Spec detection 2.6.

Letters: B batch, C channels, h w a map's rows and columns.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.vit import LAYER_NORM_EPS


def strides_of(patch_size: int) -> tuple[int, ...]:
    """Side in pixels of a cell of p2 ... p6 over a ViT of this patch side: 4, 8, 16, 32, 64 for 16.

    Raises: ValueError for a patch side that 4 does not divide.
    """
    if patch_size % 4:
        raise ValueError(f"patch_size={patch_size}: the feature pyramid needs a patch side that 4 divides")
    return patch_size // 4, patch_size // 2, patch_size, patch_size * 2, patch_size * 4


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of each pixel of maps [B, C, h, w].

    The result is float32, under autocast as well, so that regions are pooled in float32. It lies in memory channels
    last, which is what the convolutions behind it like best and what the map of a ViT is from the start: no copy is
    made. It is no `nn.LayerNorm`, because the published weight decay tells the two apart (spec detection 5.3).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same shape."""
        x = x.permute(0, 2, 3, 1)  # [B, h, w, C]
        x = F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, LAYER_NORM_EPS)
        return x.permute(0, 3, 1, 2)  # [B, C, h, w]


class PyramidLevel(nn.Module):
    """One map: made as large as its stride asks, reduced to the pyramid's channels, smoothed by a 3x3 convolution."""

    def __init__(self, dim: int, channels: int, num_upsamplings: int, downsample: bool = False) -> None:
        super().__init__()
        self.num_upsamplings, self.downsample = num_upsamplings, downsample
        if num_upsamplings >= 1:
            self.up1 = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        if num_upsamplings == 2:
            self.up_norm = LayerNorm2d(dim // 2)
            self.up2 = nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)
        self.reduce = nn.Conv2d(dim // 2**num_upsamplings, channels, 1, bias=False)
        self.reduce_norm = LayerNorm2d(channels)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.smooth_norm = LayerNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The ViT's map [B, D, h, w] to this level's, [B, C, h', w']."""
        if self.downsample:
            x = F.max_pool2d(x, 2)  # [B, D, h / 2, w / 2]
        if self.num_upsamplings >= 1:
            x = self.up1(x)  # [B, D / 2, 2h, 2w]
        if self.num_upsamplings == 2:
            x = self.up2(F.gelu(self.up_norm(x)))  # [B, D / 4, 4h, 4w]
        x = self.reduce_norm(self.reduce(x))  # [B, C, h', w']
        return self.smooth_norm(self.smooth(x))


class SimpleFeaturePyramid(nn.Module):
    """p2 ... p6 from one map of stride 16, each on its own: no path leads from one level to the next."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.p2 = PyramidLevel(dim, channels, num_upsamplings=2)
        self.p3 = PyramidLevel(dim, channels, num_upsamplings=1)
        self.p4 = PyramidLevel(dim, channels, num_upsamplings=0)
        self.p5 = PyramidLevel(dim, channels, num_upsamplings=0, downsample=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The ViT's last map [B, D, h, w] to p2 ... p6, [B, C, 4h, 4w] ... [B, C, h / 4, w / 4]."""
        p5 = self.p5(x)
        return [self.p2(x), self.p3(x), self.p4(x), p5, p5[:, :, ::2, ::2]]  # p6 is every other pixel of p5

    def init_weights(self, generator: torch.Generator) -> None:
        """PyTorch's default for all convolutions; norms one and zero."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                init_conv_default(module, generator)


def init_conv_default(conv: nn.Conv2d | nn.ConvTranspose2d, generator: torch.Generator) -> None:
    """What PyTorch gives a new convolution, uniform in +-1 / sqrt(fan in), from a generator of our own."""
    fan_in = conv.weight[0].numel()  # that of a transposed convolution is taken from its (in, out, k, k) weight as well
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(conv.weight, -bound, bound, generator=generator)
    if conv.bias is not None:
        nn.init.uniform_(conv.bias, -bound, bound, generator=generator)
