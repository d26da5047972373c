"""UperNet's decode head and the auxiliary head beside it (arXiv:1807.10221). Spec segmentation sections 3 and 4.

Letters: B batch, C channels of the input, D channels of the head, K classes, h w a map's rows and columns.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer.segmentation.necks import NUM_LEVELS
from transfer.segmentation.resizing import conv3x3_of_resized, resize

LOGITS_STD = 0.01


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU; mmsegmentation's name for the three."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, D, h, w]."""
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def of_resized(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """As `forward`, with a kernel of 3, of maps [B, c, h, w] resized to (H, W) and concatenated: [B, D, H, W]."""
        return F.relu(self.bn(conv3x3_of_resized(maps, self.conv.weight, size)), inplace=True)


class PyramidPooling(nn.Module):
    """The map beside averages of it over 1 x 1, 2 x 2 ... cells, fused by a 3x3 convolution (arXiv:1612.01105)."""

    def __init__(self, in_channels: int, channels: int, pool_scales: Sequence[int]) -> None:
        super().__init__()
        self.pool_scales = tuple(pool_scales)
        self.branches = nn.ModuleList(ConvModule(in_channels, channels, 1) for _ in pool_scales)
        self.bottleneck = ConvModule(in_channels + len(self.pool_scales) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, D, h, w].

        In training, batch norm over a single cell needs more than one image (of all processes, where synchronised).
        """
        pooled = [
            branch(F.adaptive_avg_pool2d(x, scale))  # [B, D, scale, scale]
            for scale, branch in zip(self.pool_scales, self.branches, strict=True)
        ]
        return self.bottleneck.of_resized([x, *pooled], x.shape[2:])


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down path to the finest, and all four fused at its size."""

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, pool_scales: Sequence[int], dropout_ratio: float
    ) -> None:
        super().__init__()
        self.dropout_ratio = dropout_ratio
        self.ppm = PyramidPooling(in_channels, channels, pool_scales)
        self.lateral_convs = nn.ModuleList(ConvModule(in_channels, channels, 1) for _ in range(NUM_LEVELS - 1))
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(NUM_LEVELS - 1))
        self.fpn_bottleneck = ConvModule(NUM_LEVELS * channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Class scores at the size of the finest map.

        Args:
            maps: four [B, C, h, w], fine to coarse.
            generator: what dropout is drawn from; None drops nothing.
        Returns: [B, K, h, w] of maps[0].
        """
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        laterals.append(self.ppm(maps[-1]))  # each [B, D, h, w] of its level
        for i in range(NUM_LEVELS - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + resize(laterals[i], laterals[i - 1].shape[2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)] + laterals[-1:]
        fused = self.fpn_bottleneck.of_resized(outputs, outputs[0].shape[2:])  # [B, D, h, w]
        return self.conv_seg(channel_dropout(fused, self.dropout_ratio, generator))

    def init_weights(self, generator: torch.Generator) -> None:
        """Kaiming-normal convolutions, scores near zero."""
        init_head(self, self.conv_seg, generator)


class FCNHead(nn.Module):
    """One 3x3 convolution and class scores: the auxiliary head, which only training knows."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout_ratio: float) -> None:
        super().__init__()
        self.dropout_ratio = dropout_ratio
        self.conv = ConvModule(in_channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B, C, h, w] to class scores [B, K, h, w]; dropout is drawn from `generator`, None drops nothing."""
        return self.conv_seg(channel_dropout(self.conv(x), self.dropout_ratio, generator))

    def init_weights(self, generator: torch.Generator) -> None:
        """Kaiming-normal convolutions, scores near zero."""
        init_head(self, self.conv_seg, generator)


def init_head(head: nn.Module, conv_seg: nn.Conv2d, generator: torch.Generator) -> None:
    """Kaiming-normal (fan out, ReLU) for every convolution but `conv_seg`, which has deviation 0.01 and no bias."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d) and module is not conv_seg:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    init_conv_seg(conv_seg, generator)


def init_conv_seg(conv_seg: nn.Conv2d, generator: torch.Generator) -> None:
    """Scores near zero at first: normal weights of deviation 0.01, biases zero."""
    nn.init.normal_(conv_seg.weight, std=LOGITS_STD, generator=generator)
    assert conv_seg.bias is not None, "class scores have a bias"
    nn.init.zeros_(conv_seg.bias)


def channel_dropout(x: Tensor, ratio: float, generator: torch.Generator | None) -> Tensor:
    """`nn.Dropout2d` from a generator: whole channels of an image are zeroed, the others raised by 1 / (1 - ratio).

    Args:
        x: [B, C, h, w]; ratio: in [0, 1).
        generator: on the device of x; None drops nothing, as in evaluation.
    """
    if generator is None or ratio == 0:
        return x
    draws = torch.rand(*x.shape[:2], 1, 1, generator=generator, device=x.device)  # [B, C, 1, 1]
    return x * ((draws >= ratio) / (1 - ratio)).to(x.dtype)
